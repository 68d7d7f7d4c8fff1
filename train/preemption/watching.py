"""All that is watched for while a run goes on: the spot market's notices, and ranks that hang."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from train.config import PreemptionSection
from train.distributed import Ranks
from train.preemption.heartbeat import Heartbeat, end_hung_job
from train.preemption.spot import Notice, NoticeWatcher
from train.preemption.stop_flag import REBALANCE, SPOT, StopFlag


@contextlib.contextmanager
def watched(
    config: PreemptionSection,
    folder: Path,
    ranks: Ranks,
    stop: StopFlag,
    step: Callable[[], int],
) -> Iterator[None]:
    """Watch until the block is left; called by all ranks.

    Args:
        folder: of the run, whose status tells why a job that hangs was ended.
        step: this rank's step; called from a thread.
    """

    def on_notice(notice: Notice) -> None:
        say(notice.words)
        if notice.kind == "interruption":
            stop.raise_for(SPOT)
        elif config.rebalance == "save":
            stop.ask_for_save()
        elif config.rebalance == "stop" and not notice.is_old:
            stop.raise_for(REBALANCE)

    def say(words: str) -> None:
        print(words, flush=True)  # not only rank 0: each machine has notices of its own

    # One of each machine asks.
    watcher = NoticeWatcher(config.poll_seconds, on_notice, say) if ranks.local_rank == 0 else None
    heartbeat = Heartbeat(ranks, config.hang_seconds, end_hung_job(folder, ranks.rank), step)
    try:
        yield
    finally:
        heartbeat.close()
        if watcher is not None:
            watcher.close()
