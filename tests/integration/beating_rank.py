"""A rank that does nothing but reduce, with a heartbeat, as a training does; for tests of ranks that hang.

    torchrun … -m tests.integration.beating_rank FOLDER HANG_SECONDS SECONDS

It writes its process id to FOLDER/<start>-<rank>.pid, its step to FOLDER/<start>-<rank>.step, and
FOLDER/<start>-<rank>.end when it leaves in good order, after SECONDS or on SIGTERM.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from train.distributed import distributed, exit_rank
from train.preemption import Heartbeat, StopFlag, end_hung_job, stop_with_parent


def main() -> None:
    folder, hang_seconds, seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    stop_with_parent()
    name = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['RANK']}"
    step = 0
    with distributed() as ranks:
        stop = StopFlag(ranks)
        stop.install()
        heartbeat = Heartbeat(ranks, hang_seconds, end_hung_job(folder, ranks.rank), lambda: step)
        (folder / f"{name}.pid").write_text(str(os.getpid()))
        ends = time.monotonic() + seconds
        reason = None
        while reason is None and ranks.sum([float(time.monotonic() < ends)])[0] == ranks.world_size:
            time.sleep(0.02)
            step += 1
            (folder / f"{name}.step").write_text(str(step))
            reason = stop.agree(torch.tensor(False)).reason
        heartbeat.close()
        (folder / f"{name}.end").write_text(str(reason))
        if ranks.rank == 1:  # ends later than the others, who said goodbye
            time.sleep(float(os.environ.get("LINGER", "0")))
    exit_rank(0)


if __name__ == "__main__":
    main()
