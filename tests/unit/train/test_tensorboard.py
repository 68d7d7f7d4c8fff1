"""TensorBoard's curves are the rows of metrics.jsonl, once each, whatever happens on the way."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import Manifest
from tests.integration.launch import write_recipe
from train.__main__ import main
from train.tracking.metrics_file import read_metrics
from train.tracking.tensorboard import TensorBoardWriter, scalars

Curves = dict[str, list[tuple[int, float]]]


def read_curves(folder: Path) -> Curves:
    """Name → (step, value) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def curves_of(rows: list[dict[str, Any]]) -> Curves:
    curves: Curves = {}
    for row in rows:
        for name, value in scalars(row):
            curves.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    return curves


def rows_up_to(last_step: int, loss: float = 1.0) -> list[dict[str, Any]]:
    """A training row every two steps, a validation of two views every four."""
    rows: list[dict[str, Any]] = []
    for step in range(2, last_step + 1, 2):
        time = 1.8e9 + step
        rows.append({"step": step, "split": "train", "loss": loss / step, "top1": 0.5, "time": time})
        if step % 4 == 0:
            for split in ("val", "val:224"):
                rows.append({"step": step, "split": split, "loss": loss, "top5": step / 100, "time": time})
    return rows


def write(folder: Path, kept: list[dict[str, Any]], step: int, new: list[dict[str, Any]]) -> None:
    writer = TensorBoardWriter(folder, kept, step)
    for row in new:
        writer.add(row)
    writer.close()
    put_in_order(folder)


def put_in_order(folder: Path) -> None:
    """TensorBoard reads files by their names, which hold the second: starts of a test may share one."""
    files = sorted((folder / "tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime_ns)
    for number, path in enumerate(files):
        path.rename(path.with_name(f"events.out.tfevents.{number:010d}"))


@pytest.mark.parametrize("num_kept", [5, 6, 7, 8])  # of step 8's rows none, training, one view's, all
def test_a_resumed_run_has_every_step_once(tmp_path: Path, num_kept: int) -> None:
    before, after = rows_up_to(12), rows_up_to(16, loss=3.0)
    assert [row["step"] for row in before][5:8] == [8, 8, 8]
    write(tmp_path, [], 0, before)
    kept, new = before[:num_kept], after[num_kept:]
    write(tmp_path, kept, 8, new)
    assert read_curves(tmp_path) == curves_of([*kept, *new])


def test_without_files_all_rows_of_the_run_are_written(tmp_path: Path) -> None:
    rows = rows_up_to(12)
    write(tmp_path, rows[:6], 8, rows[6:])
    assert read_curves(tmp_path) == curves_of(rows)


def test_a_run_that_begins_anew_forgets_the_former_start(tmp_path: Path) -> None:
    write(tmp_path, [], 0, rows_up_to(8))
    write(tmp_path, [], 0, rows_up_to(4, loss=9.0))
    assert read_curves(tmp_path) == curves_of(rows_up_to(4, loss=9.0))


def test_a_start_without_tensorboard_leaves_no_gap(tmp_path: Path) -> None:
    rows = rows_up_to(20)
    write(tmp_path, [], 0, rows[:6])  # to step 8, then without up to step 16
    write(tmp_path, rows[:13], 16, rows[13:])
    assert read_curves(tmp_path) == curves_of(rows)


def test_what_another_machine_trained_in_between_replaces_what_this_one_drew(tmp_path: Path) -> None:
    here, there = rows_up_to(12), rows_up_to(24, loss=3.0)
    write(tmp_path, [], 0, here)
    kept = here[:6] + there[6:13]  # the other machine went on from step 8, and this one does from step 16
    write(tmp_path, kept, 16, there[13:])
    assert read_curves(tmp_path) == curves_of(here[:6] + there[6:])


def test_rows_that_a_kill_left_half_written_are_written_again(tmp_path: Path) -> None:
    rows = rows_up_to(16)
    write(tmp_path, [], 0, rows[:9])
    listed = tmp_path / "tensorboard" / "written.txt"
    listed.write_text(listed.read_text()[:-5])
    write(tmp_path, rows[:12], 16, rows[12:])
    assert read_curves(tmp_path) == curves_of(rows)
    listed.unlink()  # as earlier versions left it
    write(tmp_path, rows, 16, [])
    assert read_curves(tmp_path) == curves_of(rows)


def test_a_place_that_takes_nothing_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("not a folder")
    said: list[str] = []
    writer = TensorBoardWriter(tmp_path, [], 0, said.append)
    for row in rows_up_to(20):
        writer.add(row)
    writer.close()
    (warning,) = said
    assert warning.startswith("warning: TensorBoard gets no more rows") and "metrics.jsonl" in warning


def test_a_stopped_and_resumed_training_draws_its_metrics(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    words = [
        *(str(write_recipe(tmp_path, prepared[0])), f"run.folder={tmp_path}", "run.name=x"),
        *("tracking.tensorboard=true", "validation.views.large.resolution=40", "run.log_every_steps=1"),
        "schedule.phases=[{kind: one_cycle, epochs: 2}]",
    ]
    assert main([*words, "budget.max_hours=1.0e-9"]) == 0  # ends after the first steps, validated
    put_in_order(tmp_path / "x")
    assert main(words) == 0
    rows = read_metrics(tmp_path / "x" / "metrics.jsonl")
    curves = read_curves(tmp_path / "x")
    assert curves == curves_of(rows)
    expected = {"train/loss", "train/top1", "val/top1", "val/top5", "val_large/top1", "learning_rate"}
    assert expected | {"images_per_second"} <= set(curves)
    assert [step for step, _ in curves["train/loss"]] == list(range(1, 13))


def test_a_missing_package_is_told_before_anything_is_trained(
    prepared: tuple[Path, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else found(name, *rest)
    )
    words = [str(write_recipe(tmp_path, prepared[0])), f"run.folder={tmp_path}", "tracking.tensorboard=true"]
    for command in (["check", *words], words):
        assert main(command) == 1
        assert "tracking.tensorboard needs TensorBoard: pip install -e" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/metrics.jsonl"))
