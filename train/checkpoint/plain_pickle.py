"""Go through a pickle of `torch.save` without building anything: does it hold plain values and tensors only?

Inert stand-ins take the place of all that it may name; any other name ends the reading. What is announced
(values of a tensor, nesting, values that stand once and are used a million times) is compared with the file.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch

MAX_DEPTH = 100
MAX_VALUES = 10_000_000  # counted where they are used, not where they stand
MAX_DIMENSIONS = 64
TENSOR_SLACK_BYTES = 64 << 20  # small expanded tensors, such as masks
TENSOR_FACTOR = 4  # tensors may share values, as tied weights do
STORAGES = {
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}


class UnsafeFile(ValueError):
    """What is wrong with a file, in a few words that follow its name in brackets."""


class Readable(Protocol):
    """What a pickle is read from; must not allocate for bytes that are not there."""

    def read(self, length: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


def check_pickle(file: Readable, file_bytes: int, sizes: dict[str, int] | None) -> None:
    """Read one pickle.

    Args:
        file_bytes: of the whole file that it stands in.
        sizes: bytes of each of the file's records; None for a file from before torch 1.6.

    Raises:
        UnsafeFile: it is hostile. Other kinds: it is damaged.
    """
    _check_growth(_Reader(file, file_bytes, sizes).load())


class _Stub:
    """Stands for what a pickle may name; without attributes, since a pickle can change those."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise TypeError("a name has no state")


class _Dict(dict[Any, Any]):
    def __setstate__(self, state: object) -> None:
        """Of a state_dict: versions of its modules, which need no look here."""


class _Typed:
    """A kind of storage or a dtype, by the bytes of an element; with a length, a storage."""

    __slots__ = ("element_bytes", "num_elements")

    def __init__(self, element_bytes: int, num_elements: int = -1) -> None:
        self.element_bytes, self.num_elements = element_bytes, num_elements


class _Tensor:
    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise TypeError("a tensor's state is not plain")


class _Reader(pickle._Unpickler):  # in Python: the one in C allocates what hostile numbers say
    """Goes through a pickle of `torch.save`; `sizes` are its records' bytes, None for an old file."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Readable, file_bytes: int, sizes: dict[str, int] | None) -> None:
        super().__init__(file)
        self._file_bytes, self._sizes = file_bytes, sizes
        self._tensor_bytes = 0
        self._storages: dict[Any, int] = {}
        self._known = self._names()

    def find_class(self, module: str, name: str) -> Any:
        if name in STORAGES and module in ("torch", "torch.cuda", "torch.storage"):
            return _Typed(STORAGES[name])
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return _Typed(dtype.itemsize)
        if (module, name) not in self._known:
            raise UnsafeFile(f"it asks for {module[:50]}.{name[:50]}, which is more than plain values")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> _Typed:
        name, kind, key, _, num_elements = pid[:5]
        if name not in ("storage", b"storage") or not isinstance(kind, _Typed) or kind.num_elements >= 0:
            raise UnsafeFile("it holds something else than tensors")
        num_bytes = _whole(num_elements) * kind.element_bytes
        if self._sizes is not None:
            there = self._sizes.get(str(key), -1)
        else:
            self._storages[key] = num_bytes
            there = num_bytes if sum(self._storages.values()) <= self._file_bytes else -1
        if num_bytes > there:
            raise UnsafeFile("a tensor announces more values than the file has")
        return _Typed(kind.element_bytes, num_elements)

    def _names(self) -> dict[tuple[str, str], _Stub]:
        calls: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_of_bytes,
            ("torch._utils", "_rebuild_parameter"): _first,
            ("torch._utils", "_rebuild_parameter_with_state"): _first,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda build, kind, arguments, state: build(
                *arguments
            ),
            ("torch", "Tensor"): _refuse,  # named beside the function before, and never called
            ("torch.nn.parameter", "Parameter"): _refuse,
            ("torch", "Size"): lambda sides=(): tuple(sides),
            ("torch", "device"): lambda *words: " ".join(map(str, words)),
            ("collections", "OrderedDict"): lambda: _Dict(),
            ("collections", "Counter"): lambda counts=(): _Dict(dict(counts)),  # of learning-rate schedules
            ("_codecs", "encode"): lambda text, encoding="": str(text).encode("latin1"),  # bytes
        }
        return {place: _Stub(call) for place, call in calls.items()}

    def _tensor(self, storage: Any, offset: Any, sides: Any, strides: Any, *_: Any) -> _Tensor:
        return self._measured(storage, storage.element_bytes, offset, sides, strides)

    def _tensor_of_bytes(
        self, storage: Any, offset: Any, sides: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> _Tensor:
        return self._measured(storage, dtype.element_bytes, offset, sides, strides)

    def _measured(self, storage: Any, element_bytes: int, offset: Any, sides: Any, strides: Any) -> _Tensor:
        if not isinstance(storage, _Typed) or storage.num_elements < 0:
            raise UnsafeFile("a tensor has no values")
        if len(sides) != len(strides) or len(sides) > MAX_DIMENSIONS:
            raise UnsafeFile("a tensor has an impossible shape")
        num_elements = math.prod(map(_whole, sides))
        if num_elements:
            last = _whole(offset) + sum((n - 1) * _whole(s) for n, s in zip(sides, strides, strict=True))
            if (last + 1) * element_bytes > storage.num_elements * storage.element_bytes:
                raise UnsafeFile("a tensor announces more values than the file has")
        self._tensor_bytes += num_elements * element_bytes
        if self._tensor_bytes > TENSOR_FACTOR * self._file_bytes + TENSOR_SLACK_BYTES:
            raise UnsafeFile("its tensors are many times larger than the file")
        return _Tensor()

    def load_bytearray8(self: Any) -> None:
        raise UnsafeFile("it holds something else than plain values")

    def load_setitem(self: Any) -> None:
        _check_keys([self.stack[-2]])
        pickle._Unpickler.load_setitem(self)  # type: ignore[attr-defined]

    def load_setitems(self: Any) -> None:
        _check_keys(self.stack[::2])
        pickle._Unpickler.load_setitems(self)  # type: ignore[attr-defined]

    def load_dict(self: Any) -> None:
        _check_keys(self.stack[::2])
        pickle._Unpickler.load_dict(self)  # type: ignore[attr-defined]

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    for _code in (pickle.BYTEARRAY8, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        dispatch[_code[0]] = load_bytearray8


def _first(value: Any, *_: Any) -> Any:
    return value


def _refuse(*_: Any) -> None:
    raise UnsafeFile("it builds something else than tensors")


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise UnsafeFile("a tensor has an impossible shape")
    return number


def _check_keys(keys: list[Any]) -> None:
    # A tuple of tuples as a key can take for ever to hash.
    if not all(isinstance(key, str | bytes | int | float | None) for key in keys):
        raise UnsafeFile("a key is neither a text nor a number")


def _check_growth(loaded: Any) -> None:
    """Refuse what would grow where it is used: a list of lists of one list, and so on."""
    counted: dict[int, int] = {}

    def count(value: Any, depth: int) -> int:
        if not isinstance(value, list | tuple | dict):
            return 1
        if depth > MAX_DEPTH:
            raise UnsafeFile("it is nested too deeply")
        if id(value) not in counted:
            members = value.values() if isinstance(value, dict) else value
            counted[id(value)] = 1 + sum(count(member, depth + 1) for member in members)
            if counted[id(value)] > MAX_VALUES:
                raise UnsafeFile("it holds too many values")
        return counted[id(value)]

    count(loaded, 0)
