"""Read an array of structs from a MATLAB 5 file: texts and numbers, for the `meta.mat` of ILSVRC2012.

scipy's loadmat is not used: a damaged file can crash the process in it, and such a file may come from
anybody. The format is MathWorks' "MAT-File Format", level 5: elements of (type, length, data), nested.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator

MAX_BYTES = 64 << 20  # uncompressed
HEADER_BYTES = 128
MATRIX, COMPRESSED = 14, 15
STRUCT_CLASS, CHAR_CLASS = 2, 4
NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
TEXTS = {1: "ascii", 2: "latin1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
Value = str | int | float | None  # None: neither a text nor a single number


def read_structs(content: bytes, name: str) -> list[dict[str, Value]]:
    """The structs of the variable `name`, field by field.

    Raises:
        ValueError: the file is damaged, of another version, or has no such variable.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise ValueError("no MATLAB 5 file")
    for kind, data in _elements(content[HEADER_BYTES:], order):
        if kind == COMPRESSED:
            try:
                data = zlib.decompressobj().decompress(data, MAX_BYTES)
            except zlib.error as error:
                raise ValueError(f"broken compression ({error})") from None
            kind, data = next(_elements(data, order), (0, b""))
        if kind == MATRIX:
            found, structs = _struct_array(data, order)
            if found == name and structs is not None:
                return structs
    raise ValueError(f"no array of structs called {name}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, data) of each element in a row of them."""
    position = 0
    while position + 8 <= len(data):
        kind, length = struct.unpack_from(order + "II", data, position)
        if kind >> 16:  # a small element: length and type share a word, the data follow in the next one
            kind, length, start, end = kind & 0xFFFF, kind >> 16, position + 4, position + 8
            if length > 4:
                raise ValueError("a small element is too long")
        else:
            start = position + 8
            # Compressed elements are the only ones that are not filled up to 8 bytes.
            end = start + (length if kind == COMPRESSED else -(-length // 8) * 8)
        if start + length > len(data):
            raise ValueError("it is cut off")
        yield kind, data[start : start + length]
        position = end


def _struct_array(data: bytes, order: str) -> tuple[str, list[dict[str, Value]] | None]:
    """(name, structs) of a matrix; None for one of another class."""
    parts = _elements(data, order)
    array_class, shape, name = _head(parts, order)
    if array_class != STRUCT_CLASS:
        return name, None
    width, names = next(parts, (0, b""))[1], next(parts, (0, b""))[1]
    num_bytes = struct.unpack(order + "i", width)[0] if len(width) == 4 else 0
    if num_bytes <= 0 or not names:
        raise ValueError("structs without fields")
    fields = [
        names[start : start + num_bytes].split(b"\0", 1)[0].decode("ascii", "replace")
        for start in range(0, len(names), num_bytes)
    ]
    structs = []
    for _ in range(math.prod(shape)):
        values = {}
        for field in fields:
            kind, value = next(parts, (0, b""))
            if kind != MATRIX:
                raise ValueError("a struct is incomplete")
            values[field] = _value(value, order)
        structs.append(values)
    return name, structs


def _head(parts: Iterator[tuple[int, bytes]], order: str) -> tuple[int, tuple[int, ...], str]:
    """(class, shape, name) with which every matrix begins."""
    flags, shape, name = (next(parts, (0, b""))[1] for _ in range(3))
    if len(flags) != 8 or not shape or len(shape) % 4:
        raise ValueError("an array without class or shape")
    sizes = struct.unpack(f"{order}{len(shape) // 4}i", shape)
    if min(sizes) < 0:
        raise ValueError("an array of negative size")
    return struct.unpack(order + "I", flags[:4])[0] & 0xFF, sizes, name.decode("ascii", "replace")


def _value(data: bytes, order: str) -> Value:
    if not data:
        return None
    parts = _elements(data, order)
    array_class, shape, _ = _head(parts, order)
    kind, raw = next(parts, (0, b""))
    if array_class == CHAR_CLASS and kind in TEXTS:
        encoding = TEXTS[kind]
        if encoding in ("utf-16", "utf-32"):
            encoding += "-le" if order == "<" else "-be"
        return raw.decode(encoding)
    # Whatever the class, numbers are stored in the smallest type that holds them.
    if array_class > CHAR_CLASS and math.prod(shape) == 1 and kind in NUMBERS:
        number: int | float = struct.unpack(order + NUMBERS[kind], raw)[0]
        return number
    return None
