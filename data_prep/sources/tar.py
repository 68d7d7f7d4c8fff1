"""The members of a tar that lies anywhere: in a file, in an object of S3, or inside another tar.

Only headers are read, and what a caller asks to read on the way. Python's tarfile is not used, since it ends
in silence at a damaged header and keeps a record of every member; here a tar that is cut off, damaged or
goes on after its end is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from data_prep.sources.blobs import RangeReader
from data_prep.storage import is_s3

BLOCK = 512
MAX_NAME_BYTES = 1 << 20  # of a GNU long name or a pax header
MAX_PADDING_BYTES = 2 << 20  # after the end mark; tar fills up its last record
DISK_BLOCK_BYTES = 16 << 10  # members of 100 KB lie between two headers: reading ahead would read them all
ZEROS = bytes(BLOCK)
START = re.compile(r"(\.?/)+")
NO_DATA = b"123456"  # types of links, devices and folders: whatever size they state, nothing follows


class _Damaged(Exception):
    pass


def tar_members(
    location: str, num_bytes: int, offset: int = 0, name: str | None = None
) -> Iterator[tuple[str, int, int]]:
    """(name, byte offset in `location`, length) of the regular files of a tar of `num_bytes` at `offset`.

    Args:
        name: what messages call the tar, where it lies inside another one.

    Raises:
        ValueError: it is damaged or truncated.
    """
    for member, start, length, _ in scan_tar(location, num_bytes, offset, name):
        yield member, start, length


def scan_tar(
    location: str,
    num_bytes: int,
    offset: int = 0,
    name: str | None = None,
    wanted: Callable[[str, int], bool] | None = None,
) -> Iterator[tuple[str, int, int, bytes | None]]:
    """As `tar_members`, with the content of those small members that `wanted(name, length)` asks for.

    They are read in the same pass, since they mostly share a block with their header.
    """
    # On S3 the default of 4 MiB is cheaper than a request a header.
    reader = RangeReader(location, num_bytes, offset, None if is_s3(location) else DISK_BLOCK_BYTES)
    try:
        for member, start, length in _walk(reader, num_bytes):
            content = None
            if wanted is not None and wanted(member, length):
                content = _read(reader, start, length)
            yield member, offset + start, length, content
    except _Damaged as error:
        raise ValueError(f"{name or location} is a damaged tar ({error}): download it again") from None


def _walk(reader: RangeReader, num_bytes: int) -> Iterator[tuple[str, int, int]]:
    position, long_name, pax_size = 0, None, None
    while True:
        if position + BLOCK > num_bytes:
            raise _Damaged("it ends without an end mark" if num_bytes else "it is empty")
        header = _read(reader, position, BLOCK)
        if header == ZEROS:
            if num_bytes - position > MAX_PADDING_BYTES:
                raise _Damaged("it goes on after its end mark, as if several had been joined")
            return
        _check_sum(header, position)
        kind, length = header[156:157], _number(header[124:136])
        start = position + BLOCK
        if pax_size is not None and kind not in b"xgLK":
            length = pax_size
        if kind in NO_DATA:
            length = 0
        position = start + -(-length // BLOCK) * BLOCK
        # The padding of the last member may be missing, its data may not.
        if start + length > num_bytes:
            raise _Damaged("its last file is cut off")
        if kind in b"LKxg":
            if length > MAX_NAME_BYTES:
                raise _Damaged("a file name is too long")
            if kind == b"L":
                long_name = _text(_read(reader, start, length))
            elif kind == b"x":
                records = _pax_records(_read(reader, start, length))
                long_name = _text(records["path"]) if "path" in records else long_name
                pax_size = int(records["size"]) if _is_number(records.get("size", b"")) else None
            continue
        name, size_known = long_name or _name(header), length
        long_name = pax_size = None
        if kind in b"07\0" and not name.endswith("/"):
            yield member_name(name), start, size_known
        elif kind == b"S":
            raise _Damaged("it holds sparse files; pack it again without them")


def member_name(name: str) -> str:
    """A member's name from the archive's root, without the "/" or "./" that some programs begin it with."""
    start = START.match(name)
    return name[start.end() :] if start else name


def _read(reader: RangeReader, start: int, length: int) -> bytes:
    reader.seek(start)
    content = reader.read(length)
    if len(content) != length:
        raise _Damaged("it is shorter than announced")
    return content


def _check_sum(header: bytes, position: int) -> None:
    field = header[148:156]
    expected = sum(header) - sum(field) + 8 * 32  # the field itself counts as spaces
    stated = _number(field)
    if stated == expected:
        return
    high = sum(byte > 127 for byte in header[:148] + header[156:])
    if stated != expected - 256 * high:  # old programs summed signed bytes
        raise _Damaged(f"no header at byte {position}")


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        raise _Damaged("a header's number is no number")
    return int(digits, 8) if digits else 0


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # Only POSIX's magic has the prefix; GNU keeps times in its place.
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _is_number(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) < 20


def _pax_records(content: bytes) -> dict[str, bytes]:
    """The records `<length> <key>=<value>\\n` of a pax header."""
    records = {}
    while content.strip(b"\0"):
        digits, space, _ = content.partition(b" ")
        if not space or not _is_number(digits) or not len(digits) + 1 < int(digits) <= len(content):
            raise _Damaged("an extended header is broken")
        key, _, value = content[len(digits) + 1 : int(digits)].removesuffix(b"\n").partition(b"=")
        records[key.decode("utf-8", "replace")] = value
        content = content[int(digits) :]
    if any(key.startswith("GNU.sparse") for key in records):
        raise _Damaged("it holds sparse files; pack it again without them")
    return records
