"""The engine on one and two ranks: sums, skips, phases and restarts, in real processes on gloo."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.manifest import Manifest
from tests.integration.launch import read_json, run, start, write_recipe
from tests.integration.test_training import wait_for_step
from train.checkpoint import load_checkpoint, state_sha256
from train.config import ModelSection
from train.models.build import build_model
from train.tracking.metrics_file import read_metrics

# LayerNorm: nothing in it depends on which other images are in a batch.
NO_BATCHNORM = "model.name=test_convnext"
ONE_EPOCH = "schedule.phases=[{kind: constant, epochs: 1}]"
HEAD_THEN_ALL = "schedule.phases=[{kind: constant, epochs: 1, trainable: head}, {kind: constant, epochs: 1}]"
AVERAGE = ["ema.decay=0.9", "validation.views.plain.weights=model"]
VIEWS = [
    "validation.views.mirrored.flip_average=true",
    "validation.views.large.resolution=48",
    "validation.views.near.crop_ratio=0.5",
]
TINY_STEPS = "optimizer.peak_lr=1.0e-9"
LESS_CHAOS = "optimizer.peak_lr=0.01"  # rounding errors grow with every step, the faster the larger it is

ON_BOTH: dict[str, dict[str, Any]] = {
    "plain": {"overrides": [NO_BATCHNORM, ONE_EPOCH, *AVERAGE]},
    "accumulated": {"overrides": [NO_BATCHNORM, ONE_EPOCH, "data.grad_accum_steps=3"]},
    "clipped": {
        "overrides": [NO_BATCHNORM, ONE_EPOCH, "optimizer.clip.limit=0.5", "data.grad_accum_steps=3"]
    },
    "phases": {"overrides": [NO_BATCHNORM, HEAD_THEN_ALL]},
    "sharp": {"overrides": [NO_BATCHNORM, ONE_EPOCH, "optimizer.sam.every_steps=2"]},
    "synchronized": {"overrides": [ONE_EPOCH, LESS_CHAOS, "model.sync_batchnorm=true"]},
}
ON_TWO: dict[str, dict[str, Any]] = {
    "unsynchronized": {"overrides": [ONE_EPOCH, LESS_CHAOS]},
    "skipped": {"overrides": [ONE_EPOCH], "nan": {"rank": 1, "steps": [3]}},
    "given_up": {"overrides": ["checkpoint.keep_last=9"], "nan": {"rank": 0, "steps": range(8, 99)}},
    "micro_batches": {"overrides": [NO_BATCHNORM, ONE_EPOCH, "data.grad_accum_steps=auto"]},
    "averaged": {"overrides": [ONE_EPOCH, *AVERAGE, *VIEWS]},
    "augmented": {"overrides": [NO_BATCHNORM, ONE_EPOCH, "augmentation.mixup=0.5"]},
    "early": {
        "overrides": [
            "schedule.phases=[{kind: constant, epochs: 9}]",
            "schedule.early_stopping={patience: 2, min_delta: 0.99}",
            "profile.steps=[1, 3]",
        ]
    },
    "bce": {
        "overrides": [ONE_EPOCH, TINY_STEPS, "optimizer.peak_lr_batch_size=12", "loss.kind=bce"],
    },
    "frozen": {"overrides": ["schedule.phases=[{kind: constant, epochs: 1, trainable: head}]"]},
    # RUNS is where the runs of this launch are.
    "untaught": {
        "overrides": [NO_BATCHNORM, ONE_EPOCH, "loss.distillation={teacher: RUNS/plain, weight: 0}"]
    },
    "taught": {"overrides": [NO_BATCHNORM, ONE_EPOCH, "loss.distillation={teacher: RUNS/plain, weight: 1}"]},
    # Measured by each rank on its own: the sums over ranks of the model must not take part.
    "measured": {"overrides": [ONE_EPOCH, LESS_CHAOS, "model.sync_batchnorm=true", "run.preflight=true"]},
}


def train_all(folder: Path, data: Path, cases: dict[str, dict[str, Any]], num_ranks: int) -> Path:
    runs = folder / f"on{num_ranks}"
    runs.mkdir()
    listing = folder / f"cases{num_ranks}.json"
    content = {"folder": str(runs), "recipe": str(write_recipe(folder, data)), "cases": cases}
    listing.write_text(json.dumps(content, default=list).replace("RUNS", str(runs)))
    result = run("tests.integration.train_cases", str(listing), num_ranks=num_ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return runs


@pytest.fixture(scope="module")
def trained(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of the runs on one rank and on two."""
    folder = tmp_path_factory.mktemp("engine")
    return {
        1: train_all(folder, prepared[0], ON_BOTH, 1),
        2: train_all(folder, prepared[0], ON_BOTH | ON_TWO, 2),
    }


def state(trained: dict[int, Path], name: str, num_ranks: int = 1, rank: int = 0) -> dict[str, Any]:
    return torch.load(trained[num_ranks] / name / f"rank{rank}.pt", weights_only=True)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Over all weights and statistics, relative to the largest value of each."""
    floats = [name for name, value in first.items() if value.is_floating_point()]
    return max(
        float((first[name] - second[name]).abs().max() / second[name].abs().max().clamp(min=0.01))
        for name in floats
    )


@pytest.mark.parametrize("name", ["accumulated", "plain"])
@pytest.mark.long
def test_accumulation_and_ranks_equal_the_big_batch(trained: dict[int, Path], name: str) -> None:
    whole = state(trained, "plain")["model"]
    for num_ranks in (1, 2):
        assert largest_difference(state(trained, name, num_ranks)["model"], whole) < 1e-4


@pytest.mark.parametrize("name", ["phases", "sharp", "synchronized", "clipped"])
def test_two_ranks_equal_one(trained: dict[int, Path], name: str) -> None:
    """In `phases`, too: parameters that a phase unfreezes are reduced over ranks."""
    assert largest_difference(state(trained, name, 2)["model"], state(trained, name)["model"]) < 5e-3


def test_measuring_changes_nothing(trained: dict[int, Path]) -> None:
    same = [state(trained, name, 2)["model"] for name in ("measured", "synchronized")]
    assert state_sha256(same[0]) == state_sha256(same[1])


@pytest.mark.parametrize("name", [*ON_BOTH, "skipped", "unsynchronized"])
def test_ranks_have_the_same_weights(trained: dict[int, Path], name: str) -> None:
    first, second = (state(trained, name, 2, rank)["model"] for rank in (0, 1))
    assert state_sha256(first) == state_sha256(second)


def test_options_change_the_result(trained: dict[int, Path]) -> None:
    plain = state(trained, "plain")["model"]
    for name in ("clipped", "sharp", "phases"):
        assert largest_difference(state(trained, name)["model"], plain) > 1e-2, name
    for name in ("augmented", "taught"):
        assert largest_difference(state(trained, name, 2)["model"], plain) > 1e-2, name
    apart = state(trained, "unsynchronized", 2)["model"]
    assert largest_difference(apart, state(trained, "synchronized")["model"]) > 1e-2


def weights_at_start(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # run.seed of the recipe
    return build_model(ModelSection(name=name), 4).state_dict()


def test_a_frozen_backbone_keeps_its_statistics(trained: dict[int, Path]) -> None:
    at_start, at_end = weights_at_start("test_resnet"), state(trained, "frozen", 2)["model"]
    assert {name for name in at_end if not torch.equal(at_end[name], at_start[name])} == {
        "fc.weight",
        "fc.bias",
    }


def test_bce_starts_at_the_prior_and_the_rate_is_scaled(trained: dict[int, Path]) -> None:
    bias = state(trained, "bce", 2)["model"]["fc.bias"]
    torch.testing.assert_close(bias, torch.full((4,), -math.log(4)), rtol=0, atol=1e-4)
    rows = read_metrics(trained[2] / "bce" / "metrics.jsonl")
    assert {row["learning_rate"] for row in rows} == {2e-9}  # 24 images a step, the rate is for 12


def test_a_teacher_without_weight_changes_nothing(trained: dict[int, Path]) -> None:
    both = [state(trained, name, 2)["model"] for name in ("untaught", "plain")]
    assert state_sha256(both[0]) == state_sha256(both[1])


def test_early_stopping_ends_the_run_finished(trained: dict[int, Path]) -> None:
    summary = read_json(trained[2] / "early" / "summary.json")
    assert summary["stopped_because"] == "early stopping" and summary["epochs"] == 3
    assert read_json(trained[2] / "early" / "status.json")["status"] == "finished"
    page = (trained[2] / "early" / "profile" / "profile.md").read_text()
    assert "| forward |" in page and "| backward |" in page and "| data |" in page


def test_views_differ_and_have_their_names(trained: dict[int, Path]) -> None:
    summary = read_json(trained[2] / "averaged" / "summary.json")
    assert set(summary["views"]) == {"plain", "mirrored", "large", "near"}
    last = {row["split"]: row for row in read_metrics(trained[2] / "averaged" / "metrics.jsonl")}
    losses = {last[split]["loss"] for split in ("val", *(f"val:{name}" for name in summary["views"]))}
    assert len(losses) == 5 and last["val:large"]["resolution"] == 48


def test_first_phase_trains_the_head_alone(trained: dict[int, Path]) -> None:
    rows = read_metrics(trained[2] / "phases" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "val"] == [6, 12]
    after_head = load_checkpoint(trained[2] / "phases" / "checkpoints" / "step-00000006.pt")["model"]
    at_start = weights_at_start("test_convnext")
    changed = {name for name, value in after_head.items() if not torch.equal(value, at_start[name])}
    assert changed == {"head.fc.weight", "head.fc.bias"}
    at_end = state(trained, "phases", 2)["model"]
    assert sum(not torch.equal(at_end[name], at_start[name]) for name in at_end) > len(at_end) * 0.9


@pytest.mark.parametrize("name", ["plain", "averaged"])
def test_average_is_its_own_on_all_ranks_and_validated(trained: dict[int, Path], name: str) -> None:
    first, second = (state(trained, name, 2, rank) for rank in (0, 1))
    assert state_sha256(first["ema"]) == state_sha256(second["ema"])
    assert largest_difference(first["ema"], first["model"]) > 1e-3
    model = "test_convnext" if name == "plain" else "test_resnet"
    assert largest_difference(first["ema"], weights_at_start(model)) > 1e-3
    path = trained[2] / name / "checkpoints" / "step-00000006.pt"
    assert load_checkpoint(path)["ema_updates"] == 6
    summary = read_json(trained[2] / name / "summary.json")
    assert summary["validation"].endswith("ema") and "plain" in summary["views"]
    last = {r["split"]: r for r in read_metrics(trained[2] / name / "metrics.jsonl")}
    assert last["val"]["loss"] != last["val:plain"]["loss"]
    assert last["val:plain"]["top1"] == pytest.approx(summary["views"]["plain"]["top1"], rel=1e-5)
    if name == "plain":
        assert largest_difference(first["ema"], state(trained, name)["ema"]) < 1e-4


def test_a_bad_step_is_skipped_by_all_ranks(trained: dict[int, Path]) -> None:
    assert read_json(trained[2] / "skipped" / "summary.json")["skipped_steps"] == 1
    skipped = state(trained, "skipped", 2)["model"]
    assert all(bool(value.isfinite().all()) for value in skipped.values())
    assert largest_difference(skipped, state(trained, "unsynchronized", 2)["model"]) > 1e-3


def test_too_many_bad_steps_end_the_run_and_keep_the_checkpoint(trained: dict[int, Path]) -> None:
    folder = trained[2] / "given_up"
    for rank in (0, 1):
        assert "non-finite in 4 steps in a row" in (folder / f"error-{rank}.txt").read_text()
    names = [path.name for path in (folder / "checkpoints").glob("step-*.pt")]
    assert names == ["step-00000006.pt"] and load_checkpoint(folder / "checkpoints" / names[0])


def test_automatic_micro_batch_is_found_once(trained: dict[int, Path]) -> None:

    found = read_json(trained[2] / "micro_batches" / "micro_batch.json")
    assert found == {"rank_batch_size": 12, "grad_accum_steps": 1, "resolution": 32}


FULL = [
    "data.grad_accum_steps=2",
    "augmentation.mixup=0.4",
    "augmentation.random_erasing=0.5",
    "augmentation.rotation_degrees=15",
    "model.dropout=0.2",
    "model.stochastic_depth=0.1",
    "ema.decay=0.95",
    "optimizer.sam.every_steps=3",
    "optimizer.clip.limit=2",
    "loss.kind=bce",
    "schedule.early_stopping.patience=3",
]


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.long), 2])
def test_stopped_with_everything_on_equals_a_calm_run(
    prepared: tuple[Path, Manifest], tmp_path: Path, num_ranks: int
) -> None:
    pytest.importorskip("kornia")
    changes = {"global_batch_size: 24": "global_batch_size: 8", "every_steps: 2": "every_steps: 1"}
    recipe = write_recipe(tmp_path, prepared[0], **changes)
    words = ("train", str(recipe), f"run.folder={tmp_path}/runs", NO_BATCHNORM, *FULL)
    calm = run(*words, "run.name=calm", num_ranks=num_ranks)
    assert calm.returncode == 0, calm.stdout + calm.stderr
    folder = tmp_path / "runs" / "stopped"
    process = start(*words, "run.name=stopped", num_ranks=num_ranks)
    wait_for_step(folder, 25, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert read_json(folder / "status.json")["status"] == "restart", output
    again = run(*words, "run.name=stopped", num_ranks=num_ranks)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stdout + again.stderr
    states = [
        load_checkpoint(tmp_path / "runs" / name / "checkpoints" / "step-00000060.pt")
        for name in ("calm", "stopped")
    ]
    for part in ("model", "ema"):
        assert state_sha256(states[0][part]) == state_sha256(states[1][part])
    assert states[0]["early_stopping"] == states[1]["early_stopping"]


@pytest.mark.long
def test_a_budget_shortens_the_run_which_anneals_inside_it(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, prepared[0])
    phases = "schedule.phases=[{kind: cosine, epochs: 5000}]"
    words = ("train", str(recipe), f"run.folder={tmp_path}/runs", phases, "budget.usd_per_hour=3600")
    budget = ("budget.shorten=true", "budget.max_usd=12")  # twelve seconds
    ended = run(*words, *budget)
    assert ended.returncode == 0 and "does not hold 5000 epochs" in ended.stdout, ended.stdout + ended.stderr
    summary = read_json(tmp_path / "runs" / "tiny" / "summary.json")
    assert summary["stopped_because"] in ("finished", "budget") and summary["planned_epochs"] == 5000
    # What comes after the last step is not in the budget, and takes longer on a busy machine.
    assert 1 <= summary["epochs"] < 500 and summary["cost_usd"] < 90
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl")]
    assert max(rates) > 0.04
    if summary["stopped_because"] == "finished":
        assert rates[-1] < 1e-4 and "shortened" in read_json(tmp_path / "runs/tiny/status.json")["reason"]


def test_a_spent_budget_ends_with_figures_and_a_larger_one_goes_on(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, prepared[0], **{"run: {": "run: {name: spent, "})
    words = ("train", str(recipe), f"run.folder={tmp_path}/runs", "budget.usd_per_hour=3600")
    first = run(*words, "budget.max_usd=0.01")  # spent at the first step
    assert first.returncode == 0 and "raise it and run the same command" in first.stdout, first.stderr
    folder = tmp_path / "runs" / "spent"
    summary = read_json(folder / "summary.json")
    assert summary["stopped_because"] == "budget" and summary["epochs"] == 0 < summary["final_top1"]
    again = run(*words, "budget.max_usd=1000")
    assert again.returncode == 0 and "going on from" in again.stdout, again.stdout + again.stderr
    assert read_json(folder / "summary.json")["stopped_because"] == "finished"


def test_a_failed_start_does_not_keep_its_name(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, prepared[0], **{"run: {": "run: {name: again, "})
    late = "schedule.phases=[{kind: constant, epochs: 1}, {kind: constant, epochs: 1, trainable: [layr1]}]"
    words = ("train", str(recipe), f"run.folder={tmp_path}/runs")
    wrong = run(*words, late)
    assert wrong.returncode != 0 and "did you mean" in wrong.stderr and "epoch   1" not in wrong.stdout
    right = run(*words, ONE_EPOCH, "optimizer.backbone_lr_fraction=0.1", "data.grad_accum_steps=auto")
    assert right.returncode == 0, right.stdout + right.stderr


@pytest.mark.long
def test_a_compiled_model_learns_the_same(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, prepared[0])
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        overrides = (f"run.name={name}", f"model.compile={compiled}", ONE_EPOCH, LESS_CHAOS)
        result = run("train", str(recipe), f"run.folder={tmp_path}", *overrides)
        assert result.returncode == 0, result.stdout + result.stderr
    plain, compiled_state = (
        load_checkpoint(tmp_path / name / "checkpoints" / "step-00000006.pt")["model"]
        for name in ("plain", "compiled")
    )
    assert list(plain) == list(compiled_state)  # no prefix of the wrapper's
    assert largest_difference(compiled_state, plain) < 1e-2
