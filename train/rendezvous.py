"""The store in which ranks find each other, new for every start of the group.

When torchrun starts the ranks again, the store of its agent is the same as before (torch 2.15), and so are
the addresses of the dead ranks in it: gloo would connect to those, and fail at every restart. The number of
the restart is no help, since each machine's agent counts for itself. So rank 0 draws a word for this start,
and each rank waits until rank 0 has confirmed it under that word.

Example:
    >>> store, start_id, rank, world_size = fresh_store(timedelta(minutes=10))
    >>> dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

POLL_SECONDS = 0.02


def fresh_store(timeout: timedelta) -> tuple[dist.Store, str, int, int]:
    """(Store of this start, its word, rank, world size), by the environment that torchrun sets.

    Raises:
        RuntimeError: the other ranks did not come in time.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    start_id = meet(store, rank, world_size, timeout.total_seconds())
    return dist.PrefixStore(f"start-{start_id}", store), start_id, rank, world_size


def meet(store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A word that all ranks of this start know, and no rank of another one."""
    deadline = time.monotonic() + timeout_seconds
    if rank == 0:
        return _invite(store, world_size, deadline)
    own = uuid.uuid4().hex
    while True:
        word = store.get("sprint/start").decode()  # waits for the first one
        store.set(f"sprint/{word}/rank{rank}", own)
        # An earlier start's word is confirmed, too, but not for us.
        while store.get("sprint/start").decode() == word:
            if store.check([f"sprint/{word}/confirmed"]):
                if json.loads(store.get(f"sprint/{word}/confirmed")).get(str(rank)) == own:
                    return word
                store.set(f"sprint/{word}/rank{rank}", own)
            if time.monotonic() > deadline:
                raise RuntimeError("rank 0 did not begin this start: look at its machine's log")
            time.sleep(POLL_SECONDS)


def _invite(store: dist.Store, world_size: int, deadline: float) -> str:
    word = uuid.uuid4().hex
    store.set("sprint/start", word)
    missing = set(range(1, world_size))
    came: dict[str, str] = {}
    while missing:
        for rank in sorted(missing):
            if store.check([f"sprint/{word}/rank{rank}"]):
                came[str(rank)] = store.get(f"sprint/{word}/rank{rank}").decode()
                missing.discard(rank)
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"rank(s) {', '.join(map(str, sorted(missing)))} did not come to the start")
        time.sleep(POLL_SECONDS)
    store.set(f"sprint/{word}/confirmed", json.dumps(came))
    return word
