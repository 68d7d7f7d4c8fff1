"""Loading as a training shows it: damage, changing files, resolutions, backends, S3, preflight."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.manifest import Manifest, load_index, load_keys
from tests.conftest import ROOT
from tests.integration.launch import environment, read_json, run, start, write_recipe
from tests.integration.s3_server import SECRET, Asked, Bucket
from train.__main__ import main
from train.checkpoint import CheckpointStore, load_checkpoint, state_sha256
from train.config import load_recipe
from train.data.order import epoch_order
from train.tracking.metrics_file import read_metrics

NUM_TRAIN, NUM_VAL = 160, 43  # of the fixture `prepared`
STEPS = 40  # an epoch of batches of 4: long enough to be stopped in the middle
GROWING = "data.resolution={0: 24, 1: 32}"
ONE_EPOCH = "schedule.phases=[{kind: one_cycle, epochs: 1}]"
ALLOWED = "data.max_damaged_fraction=0.05"  # 8 training samples, 2 of validation


def small_steps(folder: Path, data: Path | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return write_recipe(
        folder,
        data,  # type: ignore[arg-type]
        **{"global_batch_size: 24": "global_batch_size: 4", "every_steps: 2": "every_steps: 1"},
    )


def damage(data: Path, split: str, sample_ids: list[int]) -> None:
    """One byte of each of these samples becomes another; file sizes stay."""
    manifest = Manifest.model_validate_json((data / "manifest.json").read_bytes())
    index = load_index(data, manifest, split)  # type: ignore[arg-type]
    for row in index[sample_ids]:
        shard = data / manifest.splits[split].shards[row["shard"]].name  # type: ignore[index]
        with shard.open("r+b") as file:
            place = int(row["offset"]) + int(row["length"]) // 2
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0xFF]))


def mend(data: Path, intact: Path) -> None:
    """As a user does: copy the intact shards back."""
    shutil.copytree(intact, data, dirs_exist_ok=True)


def met_by_both_ranks() -> int:
    """A sample that another rank of two has in epoch 1 than in epoch 0."""
    ranks = np.empty((2, NUM_TRAIN), int)
    for epoch in (0, 1):
        ranks[epoch, epoch_order(0, epoch, NUM_TRAIN)] = np.arange(NUM_TRAIN) % 4 // 2
    return int(np.flatnonzero(ranks[0] != ranks[1])[0])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint."""
    return load_checkpoint(last_checkpoint(folder))["model"]


def last_checkpoint(folder: Path) -> Path:
    entries = CheckpointStore(folder / "checkpoints").manifest().checkpoints
    return folder / "checkpoints" / max(entries, key=lambda entry: entry.step).name


def last_step(folder: Path) -> int:
    return int(last_checkpoint(folder).stem.removeprefix("step-"))


def parameters(folder: Path) -> str:
    """A hash of what the optimizer moves."""
    return state_sha256({k: v for k, v in weights(folder).items() if "running_" not in k})


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["split"] == split] if path.is_file() else []


def damaged_list(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "damaged.jsonl").read_text().splitlines()]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in rows(folder, "train")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def stop_at(folder: Path, step: int, *words: str, num_ranks: int = 1) -> None:
    """Start a training, and stop it as a cluster does, soon after a step."""
    process = start(*words, num_ranks=num_ranks)
    try:
        wait_for_step(folder, step, process)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=100)[0]
    finally:
        process.kill()
    assert read_json(folder / "status.json")["status"] == "restart", output
    assert step <= last_step(folder), output


def failed(folder: Path) -> str:
    status = read_json(folder / "status.json")
    assert status["status"] == "failed", status
    return str(status["reason"])


def succeeded(result: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    """The summary of a run that finished."""
    assert result.returncode == 0, result.stdout + result.stderr
    assert read_json(folder / "status.json")["status"] == "finished"
    return read_json(folder / "summary.json")


class Damaged:
    """Two ranks, growing resolution, one damaged training sample and two of validation."""

    def __init__(self, folder: Path, intact: Path) -> None:
        self.data = Path(shutil.copytree(intact, folder / "data"))
        self.train_id, self.val_ids = met_by_both_ranks(), [3, 42]
        damage(self.data, "train", [self.train_id])
        damage(self.data, "val", self.val_ids)
        recipe = small_steps(folder, self.data)
        self.words = ["train", str(recipe), f"run.folder={folder}/runs", ALLOWED, GROWING]
        self.runs = folder / "runs"
        self.folder = self.runs / "calm"
        self.result = run(*self.words, "run.name=calm", num_ranks=2)
        self.summary = succeeded(self.result, self.folder)


@pytest.fixture(scope="module")
def damaged(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    return Damaged(tmp_path_factory.mktemp("damaged"), prepared[0])


def test_a_little_damage_is_told_and_listed_once(damaged: Damaged, prepared: tuple[Path, Manifest]) -> None:
    keys = {split: load_keys(*prepared, split) for split in ("train", "val")}
    listed = damaged_list(damaged.folder)
    expected = [("train", damaged.train_id), *(("val", n) for n in damaged.val_ids)]
    assert sorted((row["split"], row["sample_id"]) for row in listed) == expected
    for row in listed:
        key, shard = keys[row["split"]][row["sample_id"]], damaged.data / f"{row['split']}.beton"
        assert (row["key"], row["shard"]) == (key, str(shard)) and "CRC-32C differs" in row["reason"]
        sentence = f"sample {row['sample_id']} ({key}) in {shard} is damaged: {row['reason']}; "
        assert sentence in damaged.result.stderr
    for rank in (0, 1):
        assert f"rank {rank}: sample {damaged.train_id} (" in damaged.result.stderr, "each rank met it"
    assert damaged.summary["damaged_samples"] == 3


def test_damaged_validation_samples_count_as_wrong(damaged: Damaged) -> None:
    right = (NUM_VAL - 2) / NUM_VAL  # of four classes, the top five hold every sample that is looked at
    val = rows(damaged.folder, "val")
    assert [row["top5"] for row in val] == pytest.approx([right] * 3, rel=1e-5)
    assert all(row["damaged_samples"] == 2 and row["top1"] <= row["top5"] for row in val)
    assert damaged.summary["final_top5"] == pytest.approx(right)
    said = [line for line in damaged.result.stdout.splitlines() if line.startswith("epoch ")]
    assert len(said) == 3 and all("2 damaged, counted as wrong" in line for line in said)
    words = ("tests.integration.count_correct", str(damaged.folder), str(damaged.data), "reference", "fp32")
    counts = [
        re.findall(r"^counts .*$", run(*words, num_ranks=num_ranks).stdout, re.M) for num_ranks in (1, 2)
    ]
    correct1 = round(damaged.summary["best_top1"] * NUM_VAL)
    assert counts[0] == counts[1] == [f"counts 43 {correct1} 41"]


def test_rows_and_recipe_tell_the_resolution_of_each_epoch(damaged: Damaged) -> None:
    sides = [row["resolution"] for row in rows(damaged.folder, "train")]
    assert sides == [24] * STEPS + [32] * 2 * STEPS
    assert [row["resolution"] for row in rows(damaged.folder, "val")] == [32] * 3
    assert damaged.summary["validation_resolution"] == 32 and "at 24 → 32 px" in damaged.result.stdout
    resolved = load_recipe(damaged.folder / "recipe.yaml")
    assert resolved == load_recipe(Path(damaged.words[1]), [*damaged.words[2:], "run.name=calm"])
    assert resolved.data.resolution == {0: 24, 1: 32}


def test_preflight_says_one_line_and_changes_nothing(damaged: Damaged) -> None:
    result = run(*damaged.words, "run.name=measured", "run.preflight=true", num_ranks=2)
    folder = damaged.runs / "measured"
    summary = succeeded(result, folder)
    assert "preflight" not in damaged.result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "preflight" in line]
    assert re.search(r"preflight: loader [\d,]+ images/s, model [\d,]+ at 24 px", line), line
    assert state_sha256(weights(folder)) == state_sha256(weights(damaged.folder))
    assert [row["loss"] for row in rows(folder, "val")] == [
        row["loss"] for row in rows(damaged.folder, "val")
    ]
    assert len(damaged_list(folder)) == summary["damaged_samples"] == 3
    for name, of_run in (("calm", damaged.summary), ("measured", summary)):
        waited = [row["data_wait_fraction"] for row in rows(damaged.runs / name, "train")]
        assert len(waited) == 3 * STEPS and all(0 <= share <= 1 for share in waited)
        assert 0 < of_run["data_wait_fraction"] < 1


def test_stopped_between_damage_and_resolutions_equals_a_calm_run(damaged: Damaged) -> None:
    words = [*damaged.words, "run.name=stopped"]
    folder = damaged.runs / "stopped"
    stop_at(folder, STEPS + 2, *words, num_ranks=2)
    assert last_step(folder) < 2 * STEPS
    result = run(*words, num_ranks=2)
    summary = succeeded(result, folder)
    assert parameters(folder) == parameters(damaged.folder)
    assert [row["resolution"] for row in rows(folder, "train")] == [24] * STEPS + [32] * 2 * STEPS
    losses = [[row["loss"] for row in rows(x, "train")] for x in (folder, damaged.folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(damaged_list(folder)) == summary["damaged_samples"] == 3


def test_much_damage_saves_and_ends_and_mended_it_goes_on(
    prepared: tuple[Path, Manifest], copy_of_prepared: Callable[[], Path], tmp_path: Path
) -> None:
    data = copy_of_prepared()
    broken = list(range(0, NUM_TRAIN, 8))  # 20 samples
    damage(data, "train", broken)
    words = ["train", str(small_steps(tmp_path, data)), f"run.folder={tmp_path}", ALLOWED, ONE_EPOCH]
    folder = tmp_path / "tiny"
    result = run(*words, num_ranks=2)
    assert result.returncode != 0
    found = sorted(row["sample_id"] for row in damaged_list(folder))
    assert set(found) <= set(broken) and 9 <= len(found) < 13, "soon after the ninth"
    reason = failed(folder)
    key = load_keys(*prepared, "train")[found[0]]
    assert reason.startswith(
        f"{len(found)} of 160 train samples are damaged ({len(found) / 160:.2%}, allowed"
    )
    assert "allowed are 5.00%" in reason and f"first is sample {found[0]} ({key}) in {data}" in reason
    assert str(folder / "damaged.jsonl") in reason
    for rank in (0, 1):
        assert result.stderr.count(f"error (rank {rank}): {reason}") == 1, result.stderr
    assert "Traceback (most recent call last):\n  File" not in result.stderr.partition("torch")[0]
    stopped_at = last_step(folder)
    assert 0 < stopped_at < STEPS and rows(folder, "train")[-1]["step"] == stopped_at
    assert all(bool(value.isfinite().all()) for value in weights(folder).values())

    mend(data, prepared[0])
    again = run(*words, num_ranks=2)
    summary = succeeded(again, folder)
    assert f"going on from step-{stopped_at:08d}.pt" in again.stdout and "damaged" not in again.stderr
    assert [row["step"] for row in rows(folder, "train")] == list(range(1, STEPS + 1))
    assert summary["damaged_samples"] == len(found), "those that were replaced before, too"


@pytest.mark.parametrize("num_damaged", [3, pytest.param(NUM_VAL, marks=pytest.mark.long)])
def test_much_damage_in_validation_is_validated_again_when_mended(
    prepared: tuple[Path, Manifest], copy_of_prepared: Callable[[], Path], tmp_path: Path, num_damaged: int
) -> None:
    data = copy_of_prepared()
    damage(data, "val", list(range(num_damaged)))
    words = ["train", str(small_steps(tmp_path, data)), f"run.folder={tmp_path}", ALLOWED, ONE_EPOCH]
    folder = tmp_path / "tiny"
    assert run(*words).returncode == 1
    share = f"{num_damaged / NUM_VAL:.2%}"
    assert failed(folder).startswith(f"{num_damaged} of 43 val samples are damaged ({share}, allowed")
    assert last_step(folder) == STEPS and not rows(folder, "val")
    mend(data, prepared[0])
    summary = succeeded(run(*words), folder)
    (row,) = rows(folder, "val")
    assert row["step"] == STEPS and "damaged_samples" not in row
    assert summary["final_top5"] == row["top5"] == 1


def zero(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 4)


def overwrite(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(np.random.default_rng(0).bytes(size))


def flip(path: Path) -> None:
    """A byte of each training sample in this shard: such a sample still decodes, into something else."""
    manifest = Manifest.model_validate_json((path.parent / "manifest.json").read_bytes())
    shard = [entry.name for entry in manifest.splits["train"].shards].index(path.name)
    ids = np.flatnonzero(load_index(path.parent, manifest, "train")["shard"] == shard)
    damage(path.parent, "train", ids.tolist())


def change_while_running(
    data: Path, shards: str, how: Callable[[Path], None], tmp_path: Path, *overrides: str, num_ranks: int = 1
) -> tuple[int, str]:
    """Change shards of a running training in place; its exit code and what it said."""
    words = ["train", str(small_steps(tmp_path, data)), f"run.folder={tmp_path}", *overrides]
    process = start(*words, num_ranks=num_ranks)
    try:
        wait_for_step(tmp_path / "tiny", STEPS + 2, process)  # a checkpoint and checked samples are there
        for path in sorted(data.glob(shards)):
            how(path)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert not re.search(r"SIG(BUS|SEGV|ABRT)|During handling", output), output
    folder = tmp_path / "tiny"
    assert all(bool(value.isfinite().all()) for value in weights(folder).values())
    assert all(math.isfinite(row["loss"]) for row in rows(folder, "train"))
    return process.returncode, output


LOADERS = [
    pytest.param("reference", marks=pytest.mark.long),
    pytest.param("ffcv", marks=[pytest.mark.ffcv, pytest.mark.long]),
    pytest.param("dali", marks=[pytest.mark.dali, pytest.mark.long]),
]


@pytest.mark.parametrize(
    ("loader", "how", "num_ranks"),
    [
        pytest.param("reference", zero, 2, marks=pytest.mark.long),
        pytest.param("reference", cut, 1, marks=pytest.mark.long),
        pytest.param("ffcv", cut, 1, marks=pytest.mark.ffcv),
        pytest.param("ffcv", zero, 2, marks=[pytest.mark.ffcv, pytest.mark.long]),
        pytest.param("ffcv", overwrite, 1, marks=[pytest.mark.ffcv, pytest.mark.long]),
        pytest.param("dali", cut, 1, marks=[pytest.mark.dali, pytest.mark.long]),
        pytest.param("dali", overwrite, 2, marks=[pytest.mark.dali, pytest.mark.long]),
    ],
)
def test_a_data_set_that_is_lost_while_training_ends_it_in_a_sentence(
    copy_of_prepared: Callable[[], Path],
    tmp_path: Path,
    loader: str,
    how: Callable[[Path], None],
    num_ranks: int,
) -> None:
    data = copy_of_prepared()
    code, output = change_while_running(
        data, "train.beton", how, tmp_path, f"data.loader={loader}", ALLOWED, num_ranks=num_ranks
    )
    assert code == 1, output
    reason = failed(tmp_path / "tiny")
    assert "damaged" in reason and str(data) in reason and "copy the data set" in reason
    assert f"error (rank 0): {reason}" in output or f"error (rank 1): {reason}" in output


@pytest.mark.parametrize("loader", ["reference", *LOADERS[2:]])
@pytest.mark.parametrize(
    "how", [flip, pytest.param(zero, marks=pytest.mark.long), pytest.param(cut, marks=pytest.mark.long)]
)
def test_a_shard_that_is_lost_while_training_is_replaced_within_the_limit(
    prepared_tars: tuple[Path, Manifest], tmp_path: Path, loader: str, how: Callable[[Path], None]
) -> None:
    data = Path(shutil.copytree(prepared_tars[0], tmp_path / "copy"))
    lost = next(n for n, shard in enumerate(prepared_tars[1].splits["train"].shards) if "00003" in shard.name)
    index = load_index(*prepared_tars, "train")
    ids = np.flatnonzero(index["shard"] == lost)
    code, output = change_while_running(
        data, "train-00003.tar", how, tmp_path, f"data.loader={loader}", "data.max_damaged_fraction=0.2"
    )
    assert code == 0, output
    folder = tmp_path / "tiny"
    listed = damaged_list(folder)
    assert listed and {row["sample_id"] for row in listed} <= set(ids.tolist())
    assert {row["shard"] for row in listed} == {str(data / "train-00003.tar")}
    assert read_json(folder / "summary.json")["damaged_samples"] == len(listed)
    assert len(rows(folder, "train")) == 3 * STEPS


@pytest.mark.long
@pytest.mark.parametrize("loader", ["reference", *LOADERS[2:]])
def test_a_shard_that_is_lost_while_training_ends_it_beyond_the_limit(
    prepared_tars: tuple[Path, Manifest], tmp_path: Path, loader: str
) -> None:
    data = Path(shutil.copytree(prepared_tars[0], tmp_path / "copy"))
    code, output = change_while_running(
        data, "train-00003.tar", cut, tmp_path, f"data.loader={loader}", ALLOWED, num_ranks=2
    )
    assert code != 0, output
    reason = failed(tmp_path / "tiny")
    assert str(data / "train-00003.tar") in reason and "9 of 160 train samples are damaged" in reason
    assert last_step(tmp_path / "tiny") == rows(tmp_path / "tiny", "train")[-1]["step"] > STEPS


def test_ranks_that_fail_at_the_same_moment_leave_one_status(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from train.run_folder import write_status\n"
    code += "input('ready\\n')\n"  # so that all begin together
    code += "for _ in range(100): write_status(Path(sys.argv[1]), 'failed', 'the same sentence')"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=ROOT,
            env=environment() | {"RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    for rank in ranks:
        assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert said == ["", "", ""] and failed(tmp_path) == "the same sentence"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.long
def test_damage_since_the_last_row_is_kept_by_a_stop(
    copy_of_prepared: Callable[[], Path], tmp_path: Path
) -> None:
    data = copy_of_prepared()
    order = epoch_order(0, 0, NUM_TRAIN)
    damage(data, "train", [int(order[2 * 30])])  # of step 31, and of no other: there is one epoch
    words = ["train", str(small_steps(tmp_path, data)), f"run.folder={tmp_path}", ALLOWED, ONE_EPOCH]
    words += ["data.global_batch_size=2", "run.log_every_steps=30"]
    stop_at(tmp_path / "tiny", 30, *words)
    assert 31 < last_step(tmp_path / "tiny") < NUM_TRAIN // 2
    assert succeeded(run(*words), tmp_path / "tiny")["damaged_samples"] == 1


@pytest.mark.parametrize("loader", LOADERS[1:])
def test_resolution_of_every_loader_is_kept_over_a_stop(
    prepared: tuple[Path, Manifest], prepared_tars: tuple[Path, Manifest], tmp_path: Path, loader: str
) -> None:
    data = prepared if loader == "ffcv" else prepared_tars
    words = ["train", str(small_steps(tmp_path, data[0])), f"run.folder={tmp_path}", GROWING]
    words += [f"data.loader={loader}"]
    succeeded(run(*words, "run.name=calm", num_ranks=2), tmp_path / "calm")
    stop_at(tmp_path / "stopped", STEPS + 2, *words, "run.name=stopped", num_ranks=2)
    assert last_step(tmp_path / "stopped") < 2 * STEPS
    succeeded(run(*words, "run.name=stopped", num_ranks=2), tmp_path / "stopped")
    assert parameters(tmp_path / "calm") == parameters(tmp_path / "stopped")
    kept = [[(r["step"], r["resolution"]) for r in rows(tmp_path / x, "train")] for x in ("calm", "stopped")]
    assert kept[0] == kept[1] == [(n + 1, 24 if n < STEPS else 32) for n in range(3 * STEPS)]


@pytest.mark.ffcv
@pytest.mark.dali
def test_another_loader_goes_on_with_the_same_samples(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    words = ["train", str(small_steps(tmp_path, prepared[0])), f"run.folder={tmp_path}", ONE_EPOCH]
    words += ["optimizer.peak_lr=1.0e-6"]  # next to nothing is learnt: a step's loss tells its samples
    folder, calm = tmp_path / "tiny", tmp_path / "calm"
    succeeded(run(*words, "run.name=calm"), calm)
    stop_at(folder, 5, *words, "data.loader=ffcv")
    stopped_at = last_step(folder)
    assert stopped_at < STEPS
    again = run(*words, "data.loader=dali")
    succeeded(again, folder)
    assert f"going on from step-{stopped_at:08d}.pt" in again.stdout and "loader dali" in again.stdout
    kept = [[(r["step"], r["learning_rate"]) for r in rows(x, "train")] for x in (folder, calm)]
    assert kept[0] == kept[1] and len(kept[0]) == STEPS
    losses = np.array([[row["loss"] for row in rows(x, "train")] for x in (folder, calm)])
    assert np.corrcoef(losses)[0, 1] > 0.9 and np.corrcoef(losses[:, stopped_at:])[0, 1] > 0.9


@pytest.mark.dali
def test_tars_are_trained_on_with_dali(prepared_tars: tuple[Path, Manifest], tmp_path: Path) -> None:
    words = ["train", str(small_steps(tmp_path, prepared_tars[0])), f"run.folder={tmp_path}", ONE_EPOCH]
    result = run(*words, "data.loader=auto", num_ranks=2)
    summary = succeeded(result, tmp_path / "tiny")
    reason = "the first choice for dali shards that is here; ffcv does not read dali shards"
    assert f"loader dali ({reason})" in result.stdout
    assert len(rows(tmp_path / "tiny", "train")) == STEPS and summary["final_top5"] == 1
    assert summary["damaged_samples"] == 0 and not (tmp_path / "tiny" / "damaged.jsonl").exists()


def test_loader_that_cannot_read_the_shards_is_refused(
    prepared_tars: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(small_steps(tmp_path, prepared_tars[0])), f"run.folder={tmp_path}", "data.loader=ffcv"]
    sentence = "data.loader: ffcv does not read dali shards: set data.loader to one of dali, reference, auto"
    assert main(["check", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")
    result = run("train", *words)
    assert result.returncode == 1 and failed(tmp_path / "tiny").startswith(sentence)
    assert next(x for x in result.stderr.splitlines() if "error" in x).startswith(
        f"error (rank 0): {sentence}"
    )
    assert "Traceback" not in result.stderr


def test_check_names_a_damaged_shard_and_sample(
    prepared_tars: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(prepared_tars[0], tmp_path / "copy"))
    damage(data, "train", [77])
    shard = prepared_tars[1].splits["train"].shards[load_index(*prepared_tars, "train")["shard"][77]].name
    words = ["check", str(small_steps(tmp_path, data)), f"run.folder={tmp_path}", ALLOWED]
    assert main(words) == 1
    key = load_keys(*prepared_tars, "train")[77]
    assert f"error: {data / shard} is damaged at sample 77 ({key}): " in capsys.readouterr().err


@pytest.fixture
def remote(bucket: Bucket, prepared_tars: tuple[Path, Manifest], tmp_path: Path) -> list[str]:
    """Recipe and overrides of a training on tars in S3."""
    bucket.put_folder("some/imagenet", prepared_tars[0])
    recipe = small_steps(tmp_path, bucket.at("some/imagenet"))
    return [str(recipe), f"run.folder={tmp_path}/runs", f"data.stage_folder={tmp_path}/stage"]


def test_s3_is_staged_once_over_a_stop_then_trained_on_and_evaluated(
    bucket: Bucket, remote: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*remote, "tracking.mlflow=true", GROWING, "run.name=remote"]
    words += ["schedule.phases=[{kind: one_cycle, epochs: 2}]", "data.global_batch_size=16"]
    folder = tmp_path / "runs" / "remote"
    assert main(["check", *words]) == 0, capsys.readouterr().err
    assert not (tmp_path / "stage").exists(), "a check copies nothing"

    bucket.server.clear(lambda asked: "stall:60" if asked.key.endswith("00005.tar") else None)
    process = start("train", *words)
    try:
        while not any(asked.key.endswith("00005.tar") for asked in bucket.server.asked):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=50)[0]  # S3 would still be silent
    finally:
        process.kill()
    assert process.returncode == 0 and read_json(folder / "status.json")["status"] == "restart", output
    assert "staging was stopped by a signal" in output and not (folder / "checkpoints").exists()

    bucket.server.clear()
    result = run("train", *words, num_ranks=2)
    succeeded(result, folder)
    (copy,) = (tmp_path / "stage").iterdir()
    assert copy.name.startswith("imagenet-") and result.stdout.count("staged: ") == 1
    assert SECRET not in result.stdout + result.stderr + (folder / "recipe.yaml").read_text()
    assert load_recipe(folder / "recipe.yaml").data.path == bucket.at("some/imagenet")
    assert main(["logs", "--runs", str(folder.parent), "--file", str(tmp_path / "logs.md")]) == 0
    (row,) = [line for line in (tmp_path / "logs.md").read_text().splitlines() if "| remote |" in line]
    assert "| imagenet |" in row and "| 24 → 32 → 32 |" in row

    assert main(["check", *words]) == 1 and "is finished" in capsys.readouterr().err
    bucket.server.clear()
    evaluated = run("evaluation", str(folder), "--data", bucket.at("some/imagenet"), "--out", str(tmp_path))
    assert evaluated.returncode == 0, evaluated.stderr
    best = read_json(folder / "summary.json")["best_top1"]
    assert read_json(tmp_path / "report.json")["top1"] == pytest.approx(best)
    assert f"staged copy {copy} of {bucket.at('some/imagenet')} is reused" in evaluated.stdout
    assert not any(is_shard(asked) for asked in bucket.server.asked)


def is_shard(asked: Asked) -> bool:
    return asked.operation == "GetObject" and asked.key.endswith(".tar")


@pytest.mark.long
def test_another_run_reuses_the_staged_copy_and_finds_its_damage(
    bucket: Bucket, remote: list[str], tmp_path: Path
) -> None:
    words = ["train", *remote, ONE_EPOCH, ALLOWED]
    first = run(*words, "run.name=first", num_ranks=2)
    succeeded(first, tmp_path / "runs" / "first")
    (copy,) = (tmp_path / "stage").iterdir()
    damage(copy, "train", [5])
    bucket.server.clear()
    second = run(*words, "run.name=second", num_ranks=2)
    summary = succeeded(second, tmp_path / "runs" / "second")
    assert second.stdout.count("is reused") == 1 and not any(map(is_shard, bucket.server.asked))
    (row,) = damaged_list(tmp_path / "runs" / "second")
    assert row["sample_id"] == 5 and Path(row["shard"]).parent == copy and summary["damaged_samples"] == 1


def test_stage_folder_that_is_none_is_said_in_a_sentence(
    remote: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stage").write_text("no folder")
    sentence = f"{tmp_path / 'stage'} is no folder that may be written to: set data.stage_folder to one on"
    assert main(["check", *remote]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {sentence}")
    result = run("train", *remote)
    assert result.returncode == 1 and failed(tmp_path / "runs" / "tiny").startswith(sentence)
    assert result.stderr.count(f"error (rank 0): {sentence}") == 1 and "Traceback" not in result.stderr
