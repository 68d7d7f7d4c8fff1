"""torch's threads are the training's: what a loader's library sets them to is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Around code of FFCV, which sets torch's threads to 1 when it is imported, and to its own later."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
