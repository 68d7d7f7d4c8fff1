"""Loaders: one interface, one meaning, several backends.

`build_loader` picks the backend; `epoch()` of all of them yields the same samples with the same labels,
crops and flips, in the same order.

Example:
    >>> loader = build_loader("auto", LoaderPlan.training(folder, manifest, recipe.data, seed=0, ranks=ranks))
    >>> for batch in loader.epoch(0, resolution=64): ...
    >>> loader.close()
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from train.data.loaders.base import Loader, LoaderPlan
from train.data.loaders.threads import torch_threads_kept, typed_dicts_left_out

__all__ = ["BACKENDS", "Loader", "LoaderPlan", "build_loader", "choose_backend"]


@dataclass(frozen=True)
class Backend:
    """A way to decode; its module is imported when it is used.

    Attributes:
        module: below this package. loader: the class in it.
        formats: of shards that it reads.
        fault: why it cannot be used here, or None.
    """

    module: str
    loader: str
    formats: tuple[str, ...]
    fault: Callable[[], str | None]


def _ffcv_fault() -> str | None:
    if importlib.util.find_spec("ffcv") is None:
        return "FFCV is not installed (run scripts/setup.sh, which says what its build lacks)"
    try:
        # The extension is linked against the system's OpenCV, which may be gone since it was built.
        with torch_threads_kept(), typed_dicts_left_out():
            importlib.import_module("ffcv._libffcv")
    except Exception as error:
        return f"FFCV does not import ({error})"
    return None


def _dali_fault() -> str | None:
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return 'DALI is not installed (pip install -e ".[dali]")'
    if importlib.util.find_spec("numba") is None:
        return 'numba, which resizes what DALI decodes, is not installed (pip install -e ".[dali]")'
    try:
        importlib.import_module("nvidia.dali")
    except Exception as error:
        return f"DALI does not import ({error})"
    return None


# `auto` takes the first one that reads the shards and is there. On `.beton` DALI is some 15% faster than FFCV
# on CPUs (benchmarks/RESULTS.md), for more memory, and with a GPU decodes differently: so it comes second.
BACKENDS = {
    "ffcv": Backend("ffcv", "FfcvLoader", ("ffcv",), lambda: _ffcv_fault()),
    "dali": Backend("dali", "DaliLoader", ("dali", "ffcv"), lambda: _dali_fault()),
    "reference": Backend("reference", "ReferenceLoader", ("dali", "ffcv"), lambda: None),
}


def choose_backend(wanted: str, shard_format: str) -> tuple[str, str]:
    """Resolve `data.loader` to a backend and the reason for it.

    Raises:
        ValueError: the wanted backend is not installed, or cannot read this format.
    """
    if wanted != "auto":
        backend = BACKENDS[wanted]
        if shard_format not in backend.formats:
            able = ", ".join(name for name, other in BACKENDS.items() if shard_format in other.formats)
            raise ValueError(
                f"data.loader: {wanted} does not read {shard_format} shards: set data.loader to one of "
                f"{able}, auto, or prepare the data set again with --format {backend.formats[0]}"
            )
        if fault := backend.fault():
            raise ValueError(f"data.loader: {wanted} cannot be used: {fault}; or set data.loader=auto")
        return wanted, "asked for by the recipe"
    passed = []
    for name, backend in BACKENDS.items():
        if shard_format not in backend.formats:
            passed.append(f"{name} does not read {shard_format} shards")
        elif fault := backend.fault():
            passed.append(fault)
        elif name == "dali" and torch.cuda.is_available():
            passed.append("dali's decoding on a GPU has not been tried yet: data.loader=dali asks for it")
        else:
            reason = f"the first choice for {shard_format} shards that is here"
            return name, "; ".join([reason, *passed])
    raise AssertionError("the reference loader reads everything")


def build_loader(wanted: str, plan: LoaderPlan) -> Loader:
    """The loader of `data.loader` for one split.

    Raises:
        ValueError: as `choose_backend`; or the shards do not fit their manifest.
    """
    name, _ = choose_backend(wanted, plan.manifest.format)
    with torch_threads_kept():
        module = importlib.import_module(f"train.data.loaders.{BACKENDS[name].module}")
        return getattr(module, BACKENDS[name].loader)(plan)
