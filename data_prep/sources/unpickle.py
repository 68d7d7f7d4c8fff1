"""Read dictionaries of lists, texts and arrays from a pickle that may come from anybody.

A pickle is a program. Here it can call nothing: the few names of NumPy that an array's pickle uses stand
for inert records of its shape and bytes, every other name ends the reading.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, ClassVar


class ForbiddenName(Exception):
    """The pickle asks for something else than an array."""


class PickledArray:
    """An array as its pickle describes it; not NumPy's own, whose state hostile bytes could break.

    Attributes:
        shape: as given.
        dtype: such as "u1".
        content: the bytes of its elements.
    """

    shape: tuple[object, ...] = ()
    dtype = ""
    is_fortran = False
    content = b""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, content = state
        self._fill(content, dtype, shape, bool(is_fortran))

    def _fill(self, content: Any, dtype: Any, shape: Any, is_fortran: bool) -> None:
        if not isinstance(shape, tuple) or not isinstance(dtype, _Dtype):
            raise TypeError("an array without shape or type")
        if not isinstance(content, bytes | bytearray):
            raise TypeError("an array without bytes")
        self.shape, self.dtype, self.is_fortran = shape, dtype.name, is_fortran
        self.content = bytes(content)


class _Dtype:
    name = ""

    def __init__(self, name: object = "", *_: object) -> None:
        text = name.decode("ascii") if isinstance(name, bytes) else str(name)
        self.name = text.lstrip("|<>=")

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment, which bytes have not


class _Function:
    """Something a pickle may call. An instance without attributes: a pickle can change functions."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise TypeError("a function has no state")


class _Reconstruct(_Function):
    __slots__ = ()

    def __call__(self, *_: object) -> PickledArray:
        return PickledArray()


class _FromBuffer(_Function):
    """How protocol 5 makes an array: (bytes, dtype, shape, order)."""

    __slots__ = ()

    def __call__(self, content: Any, dtype: Any, shape: Any, order: Any = "C") -> PickledArray:
        array = PickledArray()
        array._fill(content, dtype, shape, order in ("F", b"F"))
        return array


class _Encode(_Function):
    """How Python 3 writes bytes in old protocols: `_codecs.encode(text, "latin1")`."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any = "latin1") -> bytes:
        return str(text).encode("latin1")


class _Unpickler(pickle._Unpickler):  # in Python: the one in C allocates what hostile numbers say
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def load_bytearray8(self: Any) -> None:
        length = int.from_bytes(self.read(8), "little")
        content = bytearray(self.read(length))
        if len(content) != length:
            raise EOFError("pickle data was truncated")
        self.append(content)

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric"):
            if name == "ndarray":
                return PickledArray
            if name == "dtype":
                return _Dtype
            if name == "_reconstruct":
                return _Reconstruct()
            if name == "_frombuffer":
                return _FromBuffer()
        if module == "numpy.core.numeric" and name == "_frombuffer":
            return _FromBuffer()
        if (module, name) == ("_codecs", "encode"):
            return _Encode()
        raise ForbiddenName(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise ForbiddenName("a persistent object")


def load_pickle(content: bytes, where: str) -> dict[str, Any]:
    """The dictionary in a pickle, its keys as text; arrays are `PickledArray`s.

    Raises:
        ValueError: it is damaged, no dictionary, or wants to run something; nothing was run.
    """
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except ForbiddenName as error:
        raise ValueError(
            f"{where} asks for {error}, which no batch of CIFAR needs: it may be hostile and was not run; "
            "download it from cs.toronto.edu/~kriz"
        ) from None
    except Exception as error:  # whatever broken bytes lead the unpickler to
        raise ValueError(
            f"{where} is damaged ({type(error).__name__}: {error}): unpack the archive again"
        ) from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{where} holds no dictionary: is it a batch of CIFAR?")
    return {
        key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key): value
        for key, value in loaded.items()
    }
