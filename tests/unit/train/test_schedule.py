"""Schedules: equal to torch's own, with a plateau that acts, a shortening that anneals, and a picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.optim import lr_scheduler

from train.config import (
    ConstantPhase,
    CosinePhase,
    CyclicPhase,
    EarlyStoppingSection,
    LinearPhase,
    MultiStepPhase,
    OneCyclePhase,
    OptimizerSection,
    PlateauPhase,
    ScheduleSection,
    StepPhase,
)
from train.optim import build_optimizer
from train.schedule import EarlyStopping, Plateau, Schedule, one_cycle
from train.schedule_plot import main


@pytest.mark.parametrize("warmup", [0.1, 0.3, 0.5])
def test_one_cycle_equals_torch(warmup: float) -> None:
    phase = OneCyclePhase(epochs=1, warmup_fraction=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=200, pct_start=warmup, base_momentum=0.85, max_momentum=0.95
    )
    for step in range(200):
        rate, momentum = one_cycle(step, 200, 0.4, 0.95, phase)
        group = optimizer.param_groups[0]
        assert rate == pytest.approx(group["lr"], rel=1e-6)
        assert momentum == pytest.approx(group["momentum"], rel=1e-6)
        optimizer.step()
        if step < 199:
            theirs.step()


def build(name: str = "sgd", patience: int = 0) -> tuple[Schedule, torch.optim.Optimizer]:
    section = ScheduleSection(
        phases=(
            OneCyclePhase(epochs=2),
            PlateauPhase(epochs=4, initial_lr_fraction=0.05, momentum=0.7, patience=patience),
        )
    )
    config = OptimizerSection(name=name, peak_lr=0.4)
    return Schedule(section, config, num_steps_per_epoch=10), build_optimizer(torch.nn.Linear(2, 2), config)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_plateau_takes_over_with_its_own_rate_and_momentum(name: str) -> None:
    schedule, optimizer = build(name)
    assert schedule.begin_step(optimizer, 19) == pytest.approx(0.4 / 25e4)
    assert schedule.begin_step(optimizer, 20) == pytest.approx(0.02)
    group = optimizer.param_groups[0]
    assert (group["momentum"] if name == "sgd" else group["betas"][0]) == 0.7
    assert all(g["lr"] == pytest.approx(0.02) for g in optimizer.param_groups)


def test_plateau_cuts_when_the_loss_stops_falling() -> None:
    schedule, optimizer = build()
    schedule.end_epoch(1.0, steps_done=20)  # the cycle's last epoch is not the plateau's
    rates = []
    for epoch, loss in enumerate([0.9, 0.8, 0.8, 0.9], start=3):
        rates.append(schedule.begin_step(optimizer, (epoch - 1) * 10))
        schedule.end_epoch(loss, steps_done=epoch * 10)
    assert rates == pytest.approx([0.02, 0.02, 0.02, 0.002])
    assert schedule.begin_step(optimizer, 59) == pytest.approx(0.0002)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0002)


def test_plateau_remembers_over_a_restart() -> None:
    calm, optimizer = build(patience=1)
    losses = [0.9, 0.95, 0.94, 0.93]

    def epoch(schedule: Schedule, optimizer: torch.optim.Optimizer, number: int) -> float:
        rate = schedule.begin_step(optimizer, 20 + number * 10)
        schedule.end_epoch(losses[number], steps_done=30 + number * 10)
        return rate

    expected = [epoch(calm, optimizer, number) for number in range(4)]
    first, first_optimizer = build(patience=1)
    rates = [epoch(first, first_optimizer, number) for number in range(2)]
    second, second_optimizer = build(patience=1)
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second.load_state_dict(first.state_dict(), second_optimizer)
    rates += [epoch(second, second_optimizer, number) for number in range(2, 4)]
    assert rates == expected and expected[-1] < expected[0]


@pytest.mark.parametrize(("num_steps", "warmup"), [(2, 0.5), (4, 0.25), (10, 0.1), (1, 0.3)])
def test_shortest_cycles(num_steps: int, warmup: float) -> None:
    phase = OneCyclePhase(epochs=1, warmup_fraction=warmup)
    rates = [one_cycle(step, num_steps, 0.4, 0.9, phase)[0] for step in range(num_steps)]
    assert all(0 <= rate <= 0.4 for rate in rates)


# Each kind beside torch's scheduler, at 10 steps an epoch and a peak of 0.4


def schedule_of(*phases, **options) -> Schedule:
    return Schedule(ScheduleSection(phases=phases), OptimizerSection(peak_lr=0.4), 10, **options)


def rates_of(schedule: Schedule) -> list[float]:
    return [schedule.rate_at(step)[0] for step in range(schedule.num_steps)]


def torch_rates(build_scheduler, num_steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4, momentum=0.9)
    scheduler, rates = build_scheduler(optimizer), []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def warmed(after, warmup_steps: int = 10):
    """torch's warm-up, then `after`."""

    def build(optimizer):
        first = lr_scheduler.LinearLR(optimizer, 0.25, total_iters=warmup_steps)
        return lr_scheduler.SequentialLR(optimizer, [first, after(optimizer)], milestones=[warmup_steps])

    return build


WARM = {"warmup_epochs": 1, "warmup_lr_fraction": 0.25}


@pytest.mark.parametrize(
    ("phase", "theirs"),
    [
        (StepPhase(epochs=6, every_epochs=1.5, factor=0.3), lambda o: lr_scheduler.StepLR(o, 15, 0.3)),
        (StepPhase(epochs=6, every_epochs=0.3), lambda o: lr_scheduler.StepLR(o, 3, 0.1)),
        (
            MultiStepPhase(epochs=6, at_epochs=(1.1, 2.3, 5), factor=0.2),
            lambda o: lr_scheduler.MultiStepLR(o, [11, 23, 50], 0.2),
        ),
        (
            CosinePhase(epochs=6, final_lr_fraction=0.1),
            lambda o: lr_scheduler.CosineAnnealingLR(o, 60, eta_min=0.04),
        ),
        (
            LinearPhase(epochs=6, initial_lr_fraction=0.5, final_lr_fraction=0.1),
            lambda o: lr_scheduler.LinearLR(o, 0.5, 0.1, total_iters=60),
        ),
        (
            CyclicPhase(epochs=6, cycle_epochs=2, min_lr_fraction=0.25),
            lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.4, step_size_up=10, cycle_momentum=False),
        ),
        (
            CyclicPhase(epochs=6, cycle_epochs=2, min_lr_fraction=0.25, cycle_factor=0.5),
            lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.4, 10, mode="triangular2", cycle_momentum=False),
        ),
        (ConstantPhase(epochs=6, **WARM), lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=10)),
        (CosinePhase(epochs=6, **WARM), warmed(lambda o: lr_scheduler.CosineAnnealingLR(o, 50))),
        (LinearPhase(epochs=6, **WARM), warmed(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=50))),
        # Counted from the begin of the phase: the first cut at epoch 2 is 10 steps after the warm-up.
        (
            MultiStepPhase(epochs=6, at_epochs=(2, 4), **WARM),
            warmed(lambda o: lr_scheduler.MultiStepLR(o, [10, 30], 0.1)),
        ),
    ],
    ids=lambda value: value.kind if hasattr(value, "kind") else "",
)
def test_equal_to_torch(phase, theirs) -> None:
    assert rates_of(schedule_of(phase)) == pytest.approx(torch_rates(theirs, 60), rel=1e-6, abs=1e-12)


def test_plateau_equals_torch() -> None:
    losses = [3.0, 2.0, 1.9995, 2.1, 1.5, 1.6, 1.7, math.nan, 1.6, 1.4, *[2.0] * 12]
    phase = PlateauPhase(epochs=1, initial_lr_fraction=1, patience=1, factor=0.3, min_lr_fraction=0.01)
    ours, rates = Plateau(phase, peak_lr=0.4), []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.3, patience=1, threshold=1e-3, min_lr=0.004
    )
    for loss in losses:
        scheduler.step(loss)
        ours.update(loss)
        rates.append(ours.rate)
        assert ours.rate == pytest.approx(optimizer.param_groups[0]["lr"])
    assert rates[-1] == pytest.approx(0.004)


# Phases in a row


def test_phases_hand_over_rate_and_momentum() -> None:
    schedule = schedule_of(
        ConstantPhase(epochs=0.5, lr_fraction=0.1, momentum=0.5, trainable="head"),
        OneCyclePhase(epochs=1.5, lr_fraction=0.5, trainable=("layer4", "fc")),
        ConstantPhase(epochs=1),
    )
    optimizer = build_optimizer(torch.nn.Linear(2, 2), OptimizerSection(peak_lr=0.4))
    seen = []
    for step in range(schedule.num_steps):
        schedule.begin_step(optimizer, step)
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    assert seen[4] == (pytest.approx(0.04), 0.5) and seen[20] == (0.4, 0.9)
    assert seen[5] == (pytest.approx(0.2 / 25), 0.9) and seen[19][1] == pytest.approx(0.9)
    assert max(rate for rate, _ in seen[5:20]) == pytest.approx(0.2, rel=0.02)
    assert min(momentum for _, momentum in seen[5:20]) == pytest.approx(0.85, abs=0.003)
    assert [schedule.trainable_at(step) for step in (4, 5, 20)] == ["head", ("layer4", "fc"), "all"]


def test_plateau_acts_after_a_cycle_on_every_group() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    config = OptimizerSection(peak_lr=1e-4, backbone_lr_fraction=1e-3)
    phases = (OneCyclePhase(epochs=2), PlateauPhase(epochs=4, patience=0))
    schedule = Schedule(ScheduleSection(phases=phases), config, 10)
    optimizer = build_optimizer(model, config, head=[model[1]])
    schedule.begin_step(optimizer, 19)
    schedule.end_epoch(1.0, 20)
    for epoch, rate in ((2, 1e-6), (3, 1e-6), (4, 1e-7), (5, 1e-8)):
        for step in range(epoch * 10, epoch * 10 + 10):
            assert schedule.begin_step(optimizer, step) == pytest.approx(rate)
        # So small that torch's ReduceLROnPlateau would not cut it: 1e-8 is the least that it cuts by.
        rates = sorted({group["lr"] for group in optimizer.param_groups})
        assert rates == pytest.approx([rate * 1e-3, rate], rel=1e-6, abs=0)
        schedule.end_epoch(1.0, epoch * 10 + 10)


def test_a_plateau_hears_of_its_own_epochs_only() -> None:
    schedule = schedule_of(PlateauPhase(epochs=1, patience=0), ConstantPhase(epochs=2))
    schedule.begin_step(build()[1], 0)
    schedule.end_epoch(1.0, steps_done=10)
    state = schedule.state_dict()
    schedule.end_epoch(5.0, steps_done=20)
    assert schedule.state_dict() == state and state["plateau"]["best"] == 1.0


# Shortening


MIXED = (LinearPhase(epochs=1, final_lr_fraction=1), OneCyclePhase(epochs=5), PlateauPhase(epochs=4))


@pytest.mark.parametrize(
    "phase",
    [OneCyclePhase(epochs=10), CosinePhase(epochs=10, warmup_epochs=2), LinearPhase(epochs=10)],
    ids=lambda phase: phase.kind,
)
@pytest.mark.parametrize(("at_step", "num_steps"), [(0, 30), (40, 70), (40, 41), (55, 100)])
def test_shortened_runs_are_annealed_to_their_end(phase, at_step: int, num_steps: int) -> None:
    whole, shortened = schedule_of(phase), schedule_of(phase)
    shortened.shorten(at_step, num_steps)
    assert shortened.num_steps == num_steps
    assert rates_of(shortened)[:at_step] == rates_of(whole)[:at_step]
    assert shortened.rate_at(num_steps - 1) == whole.rate_at(99)
    if num_steps - at_step > 1:
        assert shortened.rate_at(at_step) == pytest.approx(whole.rate_at(at_step))
        middle = (at_step + num_steps - 1) / 2
        expected = whole.rate_at(round((at_step + 99) / 2))[0]
        assert shortened.rate_at(round(middle))[0] == pytest.approx(expected, rel=0.15)


def test_shortened_twice_and_resumed_is_the_same_bit_for_bit() -> None:
    schedule = schedule_of(*MIXED)
    schedule.shorten(20, 80)
    schedule.shorten(41, 60)
    resumed = schedule_of(*MIXED)
    resumed.load_state_dict(schedule.state_dict(), build()[1])
    assert resumed.num_steps == 60 and rates_of(resumed) == rates_of(schedule)
    positions = [schedule.virtual_step(step) for step in range(60)]
    assert positions == sorted(positions) and positions[:21] == list(range(21)) and positions[-1] == 99
    once = schedule_of(*MIXED)
    once.shorten(20, 80)
    assert positions[41] == once.virtual_step(41)


def test_shortening_leaves_the_plateau_its_share_and_its_patience() -> None:
    schedule, optimizer = build()  # 20 steps of a cycle, 40 of a plateau with patience 0
    schedule.shorten(20, 40)
    kinds = [schedule.span_at(step).phase.kind for step in range(40)]
    assert kinds == ["one_cycle"] * 20 + ["plateau"] * 20
    schedule.begin_step(optimizer, 20)
    schedule.end_epoch(1.0, 30)
    schedule.end_epoch(1.0, 40)
    assert schedule.begin_step(optimizer, 39) == pytest.approx(0.002)


@pytest.mark.parametrize(("at_step", "num_steps"), [(30, 30), (30, 101), (-1, 50), (70, 60)])
def test_no_shortening_that_is_none(at_step: int, num_steps: int) -> None:
    with pytest.raises(ValueError, match="cannot be shortened"):
        schedule_of(*MIXED).shorten(at_step, num_steps)
    schedule = schedule_of(*MIXED)
    schedule.shorten(50, 60)
    with pytest.raises(ValueError, match="cannot be shortened"):
        schedule.shorten(49, 55)


# Early stopping


def test_early_stopping_waits_for_its_patience() -> None:
    stopping = EarlyStopping(EarlyStoppingSection(patience=2, min_delta=0.01))
    answers = [stopping.update(top1, loss=1.0) for top1 in (0.5, 0.505, 0.6, 0.6, 0.605)]
    assert answers == [False, False, False, False, True]


def test_early_stopping_remembers_and_takes_no_nan_for_an_improvement() -> None:
    config = EarlyStoppingSection(metric="loss", patience=3)
    first, second = EarlyStopping(config), EarlyStopping(config)
    assert not first.update(0.5, math.nan) and not first.update(0.1, 1.0) and not first.update(0.9, 1.1)
    second.load_state_dict(first.state_dict())
    assert not second.update(0.9, -math.inf)
    assert second.update(0.9, 1.2) and second.best == -1.0
    assert not second.update(0.1, 0.5)


# The picture


def recipe_file(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_picture_and_table_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_file(
        tmp_path,
        "optimizer: {peak_lr: 0.5}\ndata: {resolution: {0: 128, 4: 192}}\nschedule:\n  phases:\n"
        "    - {kind: constant, epochs: 1, trainable: [layer4, fc]}\n    - {kind: one_cycle, epochs: 4}\n"
        "    - {kind: plateau, epochs: 2, initial_lr_fraction: 0.02}\n",
    )
    out = tmp_path / "schedule.png"
    assert main([recipe, "optimizer.peak_lr_batch_size=128", "--out", str(out)]) == 0
    table = capsys.readouterr().out
    assert "as in ImageNet" in table and "trains layer4 and fc" in table
    rows = {line.split()[0]: line.split() for line in table.splitlines()[1:9]}
    assert rows["0"][1:4] == ["1", "0.900", "128"] and rows["4"][3] == "192"
    assert rows["5"][1] == "0.02" and "follows the validation loss" in table
    with Image.open(out) as image:
        assert image.size[0] > 1000 and len(image.getcolors(1 << 20)) > 50


def test_picture_counts_prepared_images(prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, manifest = prepared
    recipe = recipe_file(tmp_path, "schedule: {phases: [{kind: cosine, epochs: 3}]}\n")
    arguments = [recipe, f"data.path={folder}", "data.global_batch_size=8", "--out", str(tmp_path / "a.png")]
    assert main(arguments) == 0
    assert f"{manifest.splits['train'].num_samples} training images (of {folder})" in capsys.readouterr().out


def test_steps_of_unseen_data_leave_a_fold_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_file(tmp_path, "schedule: {phases: [{kind: cosine, epochs: 3}]}\n")
    folds = ["data.path=s3://some/imagenet", "data.folds=5", "data.fold=1"]
    assert main([recipe, *folds, "--out", str(tmp_path / "a.png")]) == 0
    # 1,281,167 images in 5 folds: two of 256,234, the others of 256,233.
    assert "1,024,933 training images (as in ImageNet without fold 1 of 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["optimizer.peak=1"], "did you mean peak_lr"), (["--num-samples", "3"], "fewer than one step")],
)
def test_picture_faults(words, sentence, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "schedule.png"
    assert main([recipe_file(tmp_path, "run: {seed: 1}\n"), *words, "--out", str(out)]) == 1
    assert sentence in capsys.readouterr().err and not out.exists()
