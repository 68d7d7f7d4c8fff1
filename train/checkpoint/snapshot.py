"""A copy of a run's state in host memory, taken between two steps: training goes on while it is written.

Copies from a GPU are only queued: they are ahead of the next step's work in the same stream, and whoever
reads them waits for them first. Memory is kept for the next snapshot, since to pin it or to fault it in takes
longer than to copy.

Example:
    >>> pool = SnapshotPool()
    >>> snapshot = pool.take({"model": model.state_dict(), "step": 7})
    >>> torch.save(snapshot.wait(), file)
    >>> pool.give_back(snapshot)
"""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

Layout = tuple[torch.dtype, torch.Size, tuple[int, ...], bool]


@dataclass
class Snapshot:
    """A tree of plain containers and values, with tensors of its own on the CPU."""

    tree: Any
    buffers: list[tuple[Layout, torch.Tensor]] = field(default_factory=list)
    event: torch.cuda.Event | None = None

    def wait(self) -> Any:
        """The tree, once all copies have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.tree


class SnapshotPool:
    """Takes snapshots, and keeps the memory of those that are given back."""

    def __init__(self) -> None:
        self._free: dict[Layout, list[torch.Tensor]] = defaultdict(list)
        self._mutex = threading.Lock()

    def take(self, tree: Any) -> Snapshot:
        """Copy every tensor of a tree of dicts, lists and tuples.

        Tensors that share memory (a tied weight) stay one: else a file would hold them twice.
        """
        snapshot = Snapshot(None)
        copies: dict[tuple[Any, ...], torch.Tensor] = {}
        has_cuda = False

        def copied(value: Any) -> Any:
            nonlocal has_cuda
            if isinstance(value, torch.Tensor):
                source = value.detach()
                has_cuda = has_cuda or source.is_cuda
                key = (source.data_ptr(), source.dtype, source.shape, source.stride())
                if source.numel() == 0 or key not in copies:
                    copies[key] = self._copy(source, snapshot)
                return copies[key]
            if isinstance(value, dict):
                return {name: copied(member) for name, member in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copied(member) for member in value)
            return value

        snapshot.tree = copied(tree)
        if has_cuda:
            snapshot.event = torch.cuda.Event()
            snapshot.event.record()
        return snapshot

    def give_back(self, snapshot: Snapshot) -> None:
        """Its memory may be written over from now on."""
        with self._mutex:
            for layout, buffer in snapshot.buffers:
                self._free[layout].append(buffer)
        snapshot.buffers = []

    def _copy(self, source: torch.Tensor, snapshot: Snapshot) -> torch.Tensor:
        with self._mutex:
            free = self._free.get(layout := _layout(source))
            buffer = free.pop() if free else None
        if buffer is None:
            # With the same strides: sums over another layout are rounded in another way after a restart.
            buffer = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
        # Not blocking: only from a GPU into pinned memory does that change anything.
        buffer.copy_(source, non_blocking=source.is_cuda)
        snapshot.buffers.append((layout, buffer))
        return buffer


def _layout(tensor: torch.Tensor) -> Layout:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.is_cuda  # pinned, then
