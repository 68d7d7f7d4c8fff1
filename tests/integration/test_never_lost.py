"""A run that is killed, stopped or damaged goes on as if nothing had happened: real ranks, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.manifest import Manifest
from tests.integration.fake_imds import FakeMetadata
from tests.integration.launch import read_json, run, start_anew, write_recipe
from tests.integration.s3_server import SECRET, Bucket
from tests.integration.test_training import wait_for_step
from train.checkpoint import CheckpointMirror, CheckpointStore, load_checkpoint
from train.fork import fork_run, origin_of
from train.tracking.metrics_file import read_metrics

# All that has a memory of its own; 20 steps an epoch.
FULL = [
    "data.grad_accum_steps=2",
    "data.global_batch_size=8",
    "run.log_every_steps=3",
    "ema.decay=0.9",
    "augmentation.mixup=0.5",
    "optimizer.name=adamw",
    "optimizer.peak_lr=0.003",
    "schedule.early_stopping.patience=9",
    "checkpoint.every_steps=7",
]
OF_TIME = (
    *("time", "images_per_second", "data_wait_fraction", "cost_usd", "epoch_cost_usd", "estimated_cost_usd"),
    *("memory_bytes", "mfu"),
)
PROGRESS_OF_TIME = (
    *("elapsed_seconds", "train_seconds", "validation_seconds", "wait_seconds", "train_images"),
    "mlflow_run_id",
)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in OF_TIME} for row in rows]


def final_state(folder: Path) -> dict[str, Any]:
    store = CheckpointStore(folder / "checkpoints")
    state = load_checkpoint(store.folder / store.manifest().checkpoints[-1].name)
    for name in PROGRESS_OF_TIME:
        state["progress"].pop(name)
    return {name: value for name, value in state.items() if name != "recipe"}


def differences(first: Any, second: Any, place: str = "") -> list[str]:
    """Where two states differ, bit for bit."""
    if isinstance(first, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [place]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{place}: keys"]
        return [found for key in first for found in differences(first[key], second[key], f"{place}.{key}")]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [f"{place}: length"]
        pairs = enumerate(zip(first, second, strict=True))
        return [found for n, (a, b) in pairs for found in differences(a, b, f"{place}.{n}")]
    return [] if first == second else [f"{place}: {first} {second}"]


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in their order."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            content = path.joinpath("environ").read_bytes().split(b"\0")
        except (OSError, IndexError, ValueError):
            continue
        rank = next((int(entry[5:]) for entry in content if entry.startswith(b"RANK=")), None)
        if parent == launcher.pid and rank is not None:
            found.append((rank, int(path.name)))
    return [pid for _, pid in sorted(found)]


@pytest.fixture(scope="module")
def calm(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Recipe, folder of a run that nothing happened to)."""
    folder = tmp_path_factory.mktemp("calm")
    recipe = write_recipe(folder, prepared[0])
    result = run("train", str(recipe), f"run.folder={folder}", "run.name=calm", *FULL, num_ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    return recipe, folder / "calm"


def test_a_killed_rank_is_started_again_by_torchrun_and_changes_nothing(
    calm: tuple[Path, Path], tmp_path: Path
) -> None:
    """Rank 1 killed in the middle of an epoch, then rank 0: the end is the same, bit for bit."""
    folder = tmp_path / "killed"
    process = start_anew(
        *("train", str(calm[0]), f"run.folder={tmp_path}", "run.name=killed", *FULL),
        num_ranks=2,
        options=("--max-restarts=3",),
    )
    for step, rank in ((15, 1), (36, 0)):
        wait_for_step(folder, step, process)
        os.kill(ranks_of(process)[rank], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (
            len(rows_of(folder)) > 0 and rows_of(folder)[-1]["step"] >= step and time.monotonic() < deadline
        ):
            time.sleep(0.05)  # until the next start has cut the rows back
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "going on from" in output and "(restart 2 by torchrun)" in output, output
    assert read_json(folder / "status.json")["status"] == "finished"
    assert differences(final_state(calm[1]), final_state(folder)) == []
    assert rows_of(folder) == rows_of(calm[1])
    best = [load_checkpoint(run_folder)["model"] for run_folder in (calm[1], folder)]
    assert differences(*best) == []


@pytest.mark.long
def test_another_recipe_is_refused_and_may_fork(calm: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(calm[1], tmp_path / "first")
    (tmp_path / "first" / "status.json").unlink()  # as if it had been stopped
    words = ("train", str(calm[0]), f"run.folder={tmp_path}", "run.name=first", *FULL)
    longer = "schedule.phases=[{kind: one_cycle, epochs: 3}, {kind: plateau, epochs: 1}]"
    refused = run(*words, longer, num_ranks=1)
    assert refused.returncode == 1 and "schedule.phases.0.epochs: was 2.0, now 3.0" in refused.stderr
    assert "--fork" in refused.stderr
    checked = run("train", "check", *words[1:], longer, "--fork")
    assert checked.returncode == 0, checked.stderr
    forked = run(*words, longer, "--fork", num_ranks=2)
    assert forked.returncode == 0, forked.stdout + forked.stderr
    assert "going on from step-00000060.pt: epoch 4, step 60" in forked.stdout
    rows = [row for row in rows_of(tmp_path / "first-fork") if row["split"] == "val"]
    assert [row["step"] for row in rows] == [20, 40, 60, 80]
    assert read_json(tmp_path / "first-fork" / "summary.json")["best_epoch"] == 4
    assert differences(final_state(calm[1]), final_state(tmp_path / "first")) == []


@pytest.mark.long
def test_sample_ids_on_another_number_of_ranks(
    calm: tuple[Path, Path], prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    """Killed on two ranks, gone on with on one: no sample twice, none left out."""
    folder = tmp_path / "moved"
    words = ("train", str(calm[0]), f"run.folder={tmp_path}", "run.name=moved", *FULL)
    process = start_anew("tests.integration.train_recording", str(tmp_path / "two"), *words[1:], num_ranks=2)
    wait_for_step(folder, 27, process)
    for pid in ranks_of(process):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    again = run("tests.integration.train_recording", str(tmp_path / "one"), *words[1:])
    assert again.returncode == 0 and "step 21" in again.stdout, again.stdout + again.stderr

    def ids_of(name: str) -> dict[int, set[int]]:
        steps: dict[int, set[int]] = {}
        for path in tmp_path.glob(f"{name}-*.jsonl"):
            for row in map(json.loads, path.read_text().splitlines()):
                steps.setdefault(row["step"], set()).update(row["ids"])
        return steps

    before, after = ids_of("two"), ids_of("one")
    seen = [before[step] for step in range(21)] + [after[step] for step in range(21, 60)]
    assert all(len(ids) == 8 for ids in seen)
    assert min(after) == 21
    for epoch in range(3):
        assert len(set().union(*seen[20 * epoch : 20 * epoch + 20])) == 160  # of 160, none twice
    steps = [row["step"] for row in rows_of(folder) if row["split"] == "train"]
    assert steps == list(range(3, 61, 3))


def test_a_spot_notice_saves_to_s3_and_another_machine_goes_on(
    calm: tuple[Path, Path], tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noticed on one rank, agreed on by both; nothing but the bucket is left, and the end is the same."""
    words = ("train", str(calm[0]), f"run.folder={tmp_path}", "run.name=moved", *FULL)
    words = (*words, f"checkpoint.mirror={bucket.at('runs')}", "preemption.poll_seconds=0.1")
    words = (*words, "tracking.mlflow=true")
    folder = tmp_path / "moved"
    with FakeMetadata() as metadata:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
        process = start_anew(*words, num_ranks=2)
        wait_for_step(folder, 25, process)
        metadata.interrupt()
        output = process.communicate(timeout=110)[0]
    assert process.returncode == 0, output
    assert read_json(folder / "status.json") == {"status": "restart", "reason": "spot interruption notice"}
    assert f"all of it is in {bucket.at('runs/moved')}" in output, output
    stopped_at = load_checkpoint(next(iter(sorted(folder.glob("checkpoints/step-*.pt"), reverse=True))))
    shutil.rmtree(folder)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    again = run(*words, num_ranks=2)
    assert again.returncode == 0, again.stdout + again.stderr
    step = stopped_at["progress"]["step"]
    assert f"step {step} was brought from" in again.stdout and f"step {step}\n" in again.stdout
    assert differences(final_state(calm[1]), final_state(folder)) == []
    assert rows_of(folder) == rows_of(calm[1])
    assert SECRET not in again.stdout + again.stderr + output


@pytest.mark.long
def test_machines_without_a_common_disk_get_the_checkpoint_from_rank_0(
    calm: tuple[Path, Path], tmp_path: Path
) -> None:
    module = "tests.integration.train_apart"
    words = (str(calm[0]), "run.folder=runs", "run.name=apart", *FULL)
    folder = tmp_path / "machine0" / "runs" / "apart"
    process = start_anew(module, str(tmp_path), *words, num_ranks=2)
    wait_for_step(folder, 25, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not (tmp_path / "machine1" / "runs" / "apart" / "checkpoints").exists()
    again = run(module, str(tmp_path), *words, num_ranks=2)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stdout + again.stderr
    assert differences(final_state(calm[1]), final_state(folder)) == []


@pytest.mark.long
def test_a_run_that_was_taken_over_ends_and_asks_for_no_restart(
    calm: tuple[Path, Path], tmp_path: Path, bucket: Bucket
) -> None:
    longer = "schedule.phases=[{kind: constant, epochs: 400}]"
    words = ("train", str(calm[0]), f"run.folder={tmp_path}", "run.name=here", *FULL, longer)
    process = start_anew(*words, f"checkpoint.mirror={bucket.at('runs')}", num_ranks=2)
    wait_for_step(tmp_path / "here", 25, process)
    other = CheckpointMirror(bucket.at("runs/here"))
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        # One that is behind does not take over; this training saves several times a second.
        other.restore(tmp_path / "elsewhere" / "here")
        other.claim()
        time.sleep(0.2)
    output = process.communicate(timeout=120)[0]
    other.close(5)
    status = read_json(tmp_path / "here" / "status.json")
    assert status["status"] == "failed" and "another machine goes on with this run" in status["reason"], (
        output
    )


def test_a_fork_killed_while_it_is_made_is_made_again(calm: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / ".calm-fork.partial" / "checkpoints").mkdir(parents=True)
    (tmp_path / ".calm-fork.partial" / "checkpoints" / "step-00000060.pt").write_bytes(b"half of it")
    fork_run(calm[1], tmp_path / "calm-fork", "metrics.jsonl")
    assert origin_of(tmp_path / "calm-fork")["step"] == 60
    assert differences(final_state(calm[1]), final_state(tmp_path / "calm-fork")) == []
    assert not (tmp_path / ".calm-fork.partial").exists()
