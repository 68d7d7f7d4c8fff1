"""Loaders: one interface, one meaning, several backends.

`build_loader` picks the backend; `epoch()` of all of them yields the same samples with the same labels,
crops and flips, in the same order.

Example:
    >>> loader = build_loader("auto", LoaderPlan.training(folder, manifest, recipe.data, seed=0, ranks=ranks))
    >>> for batch in loader.epoch(0, resolution=64): ...
    >>> loader.close()
"""

from __future__ import annotations

import importlib.util

from train.data.loaders.base import Loader, LoaderPlan

__all__ = ["Loader", "LoaderPlan", "build_loader", "choose_backend"]


def choose_backend(wanted: str, shard_format: str) -> tuple[str, str]:
    """Resolve `data.loader` to a backend and the reason for it.

    Raises:
        ValueError: the wanted backend is not installed, or cannot read this format.
    """
    if wanted == "reference":
        return "reference", "asked for by the recipe"
    fault = _ffcv_fault()
    if wanted == "ffcv":
        if fault:
            raise ValueError(f"data.loader: ffcv cannot be used: {fault}; or set data.loader=reference")
        return "ffcv", "asked for by the recipe"
    if shard_format != "ffcv":
        return "reference", f"the shards are {shard_format}"
    if fault:
        return "reference", fault
    return "ffcv", "the fastest that is installed and reads these shards"


def _ffcv_fault() -> str | None:
    if importlib.util.find_spec("ffcv") is None:
        return "FFCV is not installed (run scripts/setup.sh, which says what its build lacks)"
    try:
        # The extension is linked against the system's OpenCV, which may be gone since it was built.
        importlib.import_module("ffcv._libffcv")
    except Exception as error:
        return f"FFCV does not import ({error})"
    return None


def build_loader(wanted: str, plan: LoaderPlan) -> Loader:
    """The loader of `data.loader` for one split.

    Raises:
        ValueError: as `choose_backend`; or the shards do not fit their manifest.
    """
    backend, _ = choose_backend(wanted, plan.manifest.format)
    if backend == "ffcv":
        from train.data.loaders.ffcv import FfcvLoader

        return FfcvLoader(plan)
    from train.data.loaders.reference import ReferenceLoader

    return ReferenceLoader(plan)
