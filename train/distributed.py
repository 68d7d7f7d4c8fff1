"""Ranks, devices and reductions: gloo on CPUs, NCCL on GPUs, the same recipe on both.

Everything works without `torchrun`, too: then there is one rank and no process group.

Example:
    >>> with distributed(timeout_seconds=600) as ranks:
    ...     ranks.is_primary, ranks.world_size
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from train.host_memory import keep_freed_memory
from train.rendezvous import fresh_store

T = TypeVar("T")

BROADCAST_BYTES = 64 << 20  # at a time
MEETING_SECONDS = 1.0  # between two meetings of the ranks while the primary is busy

_Outcome = tuple[Any, str | None]  # a value, or what went wrong


class PrimaryError(ValueError):
    """What went wrong on the primary rank, raised on all of them: it need be said once only."""


class StopWanted(Exception):
    """A rank was asked to stop while all of them waited for the primary; raised on all of them."""


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank, world_size: over all machines.
        local_rank, local_world_size: on this machine.
        device: where this rank computes.
        num_cores: this rank's share of the machine's cores, at least 1.
        start_id: a word of this start of the group; empty for a single rank.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    num_cores: int
    start_id: str = ""

    @property
    def is_primary(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64; every rank gets them."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def broadcast(self, value: Any) -> Any:
        """The primary's `value` on every rank (small, made of plain objects)."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def broadcast_bytes(self, content: bytes) -> bytes:
        """The primary's `content`, of any size, on every rank."""
        size = self.broadcast(len(content))
        received = bytearray(content if self.is_primary else size)
        for start in range(0, size, BROADCAST_BYTES):
            part = memoryview(received)[start : start + BROADCAST_BYTES]
            tensor = torch.frombuffer(part, dtype=torch.uint8).to(self.device)
            dist.broadcast(tensor, src=0)
            torch.frombuffer(part, dtype=torch.uint8).copy_(tensor)
        return bytes(received)

    def on_primary(self, function: Callable[[], T]) -> T:
        """Call `function` on the primary; its result, or its error as a PrimaryError, on every rank.

        Without this, an error of one rank would leave the others waiting for it.
        """
        return self._shared(_attempt(function) if self.is_primary else (None, None))

    def on_primary_in_thread(
        self, function: Callable[[], T], wants_to_stop: Callable[[], bool] = lambda: False
    ) -> T:
        """As `on_primary`, for what may take longer than the process group's timeout, a download say.

        All ranks meet every second meanwhile, so none waits long enough to run into the timeout.

        Args:
            wants_to_stop: whether this rank was asked to stop; looked at once a second.

        Raises:
            StopWanted: on every rank, where one was asked to stop; the primary's thread is left behind.
        """
        box: list[_Outcome] = []
        thread = threading.Thread(target=lambda: box.append(_attempt(function)), name="primary", daemon=True)
        if self.is_primary:
            try:
                thread.start()
            except RuntimeError as error:  # raised here, it would leave the other ranks waiting
                box.append((None, str(error)))
        while True:
            if self.is_primary and not box:
                thread.join(MEETING_SECONDS)  # the others wait for it in the sum
            is_waiting = self.is_primary and thread.is_alive()
            # Every rank gets the same sums, so all leave in the same round.
            num_waiting, num_stopping = self.sum([is_waiting, wants_to_stop()])
            if num_stopping:
                raise StopWanted
            if not num_waiting:
                return self._shared(box[0] if box else (None, "the primary's thread was ended"))

    def _shared(self, outcome: _Outcome) -> Any:
        """The primary's value, or its fault as a PrimaryError, on every rank."""
        value, fault = self.broadcast(outcome)
        if fault is not None:
            raise PrimaryError(fault)
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on every rank (small, made of plain objects)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def broadcast_weights(self, model: nn.Module) -> None:
        """Give all ranks the primary's parameters and statistics; the model must be on `device`."""
        if self.world_size == 1:
            return
        for tensor in model.state_dict().values():
            box = tensor.contiguous()  # channels-last would be refused
            dist.broadcast(box, src=0)
            tensor.copy_(box)

    def average_buffers(self, model: nn.Module) -> None:
        """Make BatchNorm statistics equal on all ranks: their mean over ranks.

        Each rank keeps its own running statistics during training, which spares a broadcast in every step.
        The update rule is linear, so averaging late is the same as averaging in every step.
        """
        if self.world_size == 1:
            return
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        flat = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
        dist.all_reduce(flat)
        flat /= self.world_size
        position = 0
        for buffer in buffers:
            buffer.copy_(flat[position : position + buffer.numel()].view_as(buffer))
            position += buffer.numel()


def _attempt(function: Callable[[], Any]) -> _Outcome:
    try:
        return function(), None
    except (ValueError, RuntimeError, OSError) as error:
        return None, str(error) or type(error).__name__
    except Exception as error:
        traceback.print_exc()  # none of the faults that we know: somebody will want to see where
        return None, f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def distributed(timeout_seconds: float = 600) -> Iterator[Ranks]:
    """Join the process group that torchrun describes, and leave it at the end.

    Args:
        timeout_seconds: how long a rank waits for the others in a reduction before it fails.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    use_cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    num_cores = rank_cores(len(os.sched_getaffinity(0)), quota_in_cores(), local_world_size)
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"rank {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}: "
                "use --nproc-per-node=gpu"
            )
        torch.cuda.set_device(device)
    else:
        # torchrun sets OMP_NUM_THREADS=1; on CPUs the ranks share all cores instead.
        torch.set_num_threads(num_cores)
        keep_freed_memory()
    start_id = ""
    if world_size > 1:
        timeout = datetime.timedelta(seconds=timeout_seconds)
        store, start_id, rank, _ = fresh_store(timeout)
        backend = "nccl" if use_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield Ranks(
            rank=int(os.environ.get("RANK", "0")),
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            device=device,
            num_cores=num_cores,
            start_id=start_id,
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_cores(num_allowed: int, quota: float | None, local_world_size: int) -> int:
    """Whole cores of each rank of a machine, at least 1.

    Args:
        num_allowed: cores that its affinity mask lets this process run on.
        quota: how many of them it may keep busy, or None; containers are limited in this way.
    """
    usable = num_allowed if quota is None else min(num_allowed, int(quota))
    return max(1, usable // local_world_size)


def quota_in_cores(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Time on cores that cgroups (v2) give this process, in cores; None where there is no limit."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    places = [line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")]
    quotas = []
    for place in places:
        folder = root / place  # in a container perhaps one of the host, that is not seen here
        for level in (folder, *folder.parents):
            if not level.is_relative_to(root):
                break
            try:
                quota, period = (level / "cpu.max").read_text(encoding="utf-8").split()
            except (OSError, ValueError):
                continue
            if quota != "max":
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout"),
    *("ncclRemoteError", "remote process exited", "Timed out waiting"),
)


def lost_rank(error: Exception) -> str | None:
    """A sentence for the errors of gloo and NCCL that only say that another rank is gone; None for others."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not any(words in text for words in LOST):
        return None
    reason = next(line for line in text.splitlines() if any(words in line for words in LOST))
    return f"another rank is gone, its own message or the system's log says why ({reason.strip()[:120]})"


def exit_rank(code: int) -> NoReturn:
    """End this process at once, its output flushed.

    With torch 2.15 and gloo, ranks of short runs often aborted while the interpreter was torn down
    ("terminate called without an active exception"; counts in benchmarks/RESULTS.md), after all work was
    done; torchrun then takes the job for failed and kills the other ranks. So there is no teardown.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def describe_hardware(ranks: Ranks) -> str:
    """One line for logs: `4 × NVIDIA L4`, or the processor's name and its number of cores."""
    if ranks.device.type == "cuda":
        return f"{ranks.world_size} × {torch.cuda.get_device_name(ranks.device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {len(os.sched_getaffinity(0))} cores"
