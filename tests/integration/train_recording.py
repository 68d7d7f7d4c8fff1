"""`python -m train`, writing down which samples each step of a rank is made of:

torchrun -m tests.integration.train_recording OUT RECIPE …      # → OUT-<rank>.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from train import __main__, loop
from train.distributed import exit_rank


def record(out: str) -> None:
    plain = loop.train_step
    file = Path(f"{out}-{os.environ.get('RANK', '0')}.jsonl").open("a", buffering=1)  # noqa: SIM115

    def train_step(run: Any, micro_batches: Any) -> None:
        ids = [sample_id for batch in micro_batches for sample_id in batch.sample_ids.tolist()]
        file.write(json.dumps({"step": run.progress.step, "ids": ids}) + "\n")
        plain(run, micro_batches)

    loop.train_step = train_step  # type: ignore[assignment]


if __name__ == "__main__":
    record(sys.argv[1])
    exit_rank(__main__.main(sys.argv[2:]))
