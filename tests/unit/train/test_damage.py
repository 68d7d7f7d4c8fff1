"""The list of damaged samples: each once, over epochs and restarts; too many of one split end a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from train.damage import DamageLog
from train.distributed import Ranks

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"), 1)


def loader(shard: str = "a.tar", num_samples: int = 100, allowed: float = 0.02, split: str = "train") -> Any:
    return SimpleNamespace(
        damaged={},
        num_samples=num_samples,
        plan=SimpleNamespace(max_damaged_fraction=allowed, split=split),
        place=lambda sample_id: {"key": f"müll/{sample_id}", "shard": shard},
        describe=lambda sample_id: f"sample {sample_id}",
    )


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "damaged.jsonl").read_text().splitlines()]


def test_a_sample_is_listed_once_over_restarts(tmp_path: Path) -> None:
    train, val = loader(), loader("val.tar", split="val")
    log = DamageLog(tmp_path, ALONE, {"train": train, "val": val})
    log.gather()
    assert log.num_samples == 0 and not (tmp_path / "damaged.jsonl").exists()
    train.damaged[7] = "CRC-32C differs"
    val.damaged[7] = "its shard ends early"
    log.gather()
    first = {"split": "train", "sample_id": 7, "reason": "CRC-32C differs", "key": "müll/7", "shard": "a.tar"}
    assert listed(tmp_path)[0] == first and log.num_samples == 2 and log.fault is None
    # The next start finds it at another path for another reason, and one more.
    train = loader("b.beton")
    again = DamageLog(tmp_path, ALONE, {"train": train, "val": loader("val.beton", split="val")})
    assert again.num_samples == 2, "the run's, not those of this start"
    train.damaged |= {7: "the disk cannot read it", 3: "CRC-32C differs"}
    again.gather()
    assert [(row["split"], row["sample_id"]) for row in listed(tmp_path)] == [
        ("train", 7),
        ("val", 7),
        ("train", 3),
    ]
    assert listed(tmp_path)[0] == first and again.num_samples == 3
    again.start_over()
    assert again.num_samples == 0


def test_share_of_a_split_that_ends_a_run(tmp_path: Path) -> None:
    train, val = loader(num_samples=1000), loader(num_samples=50, allowed=0.02, split="val")
    log = DamageLog(tmp_path, ALONE, {"train": train, "val": val})
    train.damaged |= dict.fromkeys(range(20), "zeros")
    val.damaged[5] = "zeros"
    log.gather()
    assert log.fault is None, "as many as are allowed"
    val.damaged[4] = "zeros"
    log.gather()
    assert log.fault is not None
    assert log.fault.startswith(
        "2 of 50 val samples are damaged (4.00%, allowed are 2.00%), the first is sample 4; "
    )
    assert str(tmp_path / "damaged.jsonl") in log.fault and log.num_samples == 22


def test_a_list_that_was_cut_short_is_written_anew(tmp_path: Path) -> None:
    train = loader()
    train.damaged |= {1: "zeros", 2: "zeros"}
    DamageLog(tmp_path, ALONE, {"train": train}).gather()
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    log = DamageLog(tmp_path, ALONE, {"train": train})
    log.gather()
    assert [row["sample_id"] for row in listed(tmp_path)] == [1, 2] and log.num_samples == 2
