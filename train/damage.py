"""Samples that could not be used, over all ranks: counted, listed in `damaged.jsonl`, and too many end a run.

In training another sample took their place, in validation they count as wrong: no figure is better for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.storage import write_atomically
from train.data.loaders import Loader
from train.distributed import Ranks
from train.tracking.metrics_file import read_metrics

DAMAGED_NAME = "damaged.jsonl"


class DamageLog:
    """What the loaders of all ranks found damaged.

    Attributes:
        fault: why the run must not go on, or None; the same on every rank.
    """

    def __init__(self, folder: Path, ranks: Ranks, loaders: Mapping[str, Loader]) -> None:
        self.fault: str | None = None
        self._path = folder / DAMAGED_NAME
        self._ranks = ranks
        self._loaders = loaders
        self._counted = [0.0] * len(loaders)
        self._found: dict[str, dict[int, str]] = {split: {} for split in loaders}

    @property
    def num_samples(self) -> int:
        """Damaged samples that the run met, also before a restart; known to the primary rank."""
        return len(self._listed())

    def start_over(self) -> None:
        """Forget what a start met that left no checkpoint."""
        self._path.unlink(missing_ok=True)

    def gather(self) -> None:
        """Share what was found since the last call; called by all ranks."""
        counts = self._ranks.sum([float(len(loader.damaged)) for loader in self._loaders.values()])
        if counts == self._counted:
            return
        self._counted = counts
        for of_rank in self._ranks.gather({split: dict(x.damaged) for split, x in self._loaders.items()}):
            for split, damaged in of_rank.items():
                self._found[split] |= damaged
        if self._ranks.is_primary:
            self._write()
        for split, loader in self._loaders.items():
            share = len(self._found[split]) / loader.num_samples
            if share > loader.plan.max_damaged_fraction:
                first = loader.describe(min(self._found[split]))
                self.fault = (
                    f"{len(self._found[split]):,} of {loader.num_samples:,} {split} samples are damaged "
                    f"({share:.2%}, allowed are {loader.plan.max_damaged_fraction:.2%}), the first is "
                    f"{first}; {self._path} lists all: copy the data set again or prepare it again, "
                    "and run the same command, or raise data.max_damaged_fraction"
                )

    def _write(self) -> None:
        """Add to the list what it does not hold yet: a run may have been started several times."""
        rows = self._listed()
        # Told apart by id: another start may find the same sample at another path, or for another reason.
        known = {(row.get("split"), row.get("sample_id")) for row in rows}
        for split, found in self._found.items():
            for sample_id, reason in sorted(found.items()):
                # A fold that validates is a part of the train split.
                stored = self._loaders[split].plan.split
                if (stored, sample_id) not in known:
                    row = {"split": stored, "sample_id": sample_id, "reason": reason}
                    rows.append(row | self._loaders[split].place(sample_id))
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_atomically(self._path, "".join(f"{line}\n" for line in lines).encode())

    def _listed(self) -> list[dict[str, Any]]:
        return read_metrics(self._path) if self._path.is_file() else []
