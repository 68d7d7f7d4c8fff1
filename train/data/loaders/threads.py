"""Around other libraries: torch's threads stay the training's, and nothing is compiled that is not needed."""

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


@contextlib.contextmanager
def typed_dicts_left_out() -> Iterator[None]:
    """While FFCV is imported: it fills a dict of numba's with two names, which takes seconds to compile.

    It looks into that dict from Python only, where a plain one does the same.
    """
    from numba import typed

    original = typed.Dict
    typed.Dict = dict
    try:
        yield
    finally:
        typed.Dict = original
