"""Budgets, micro-batches that fit, views of the validation split, and what the hardware could do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from train.config import BudgetSection, Recipe
from train.cost import Budget, Price, find_price
from train.data.batch import Normalize
from train.distributed import Ranks
from train.loop import steps_in_budget
from train.micro_batch import fewest_accum_steps, resolve_grad_accum_steps
from train.models.build import build_model
from train.precision import build_autocast, set_matmul_precision
from train.run_folder import MICRO_BATCH_NAME
from train.throughput import flops_per_image, model_flops_utilization
from train.validation import mean_logits, views_of

CPU = torch.device("cpu")


def budget(**section: float) -> Budget:
    config = BudgetSection(usd_per_hour=6.0, **section)  # type: ignore[arg-type]
    return Budget(config, find_price(config))


def test_the_nearer_limit_counts() -> None:
    assert budget(max_usd=3, max_hours=1).seconds == 1800 and budget(max_usd=3).name == "budget.max_usd=3"
    assert budget(max_usd=30, max_hours=1).seconds == 3600
    assert not budget().is_spent(1e9) and budget(max_hours=1).is_spent(3600)
    assert budget(max_usd=1).seconds == Price(6.0, "").cost_usd(600) * 600


def test_dollars_need_a_price() -> None:
    with pytest.raises(ValueError, match=r"max_usd needs a price: set budget\.usd_per_hour"):
        Budget(BudgetSection(max_usd=1, instance_type=None), None)


def test_a_part_of_the_rest_is_kept() -> None:
    assert budget(max_hours=1).seconds_left(600) == pytest.approx(3000 * 0.97)
    assert budget().seconds_left(600) == float("inf")


def test_micro_batches_are_equal_and_as_large_as_fit() -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= 20

    assert fewest_accum_steps(48, fits) == 3 and asked == [48, 24, 16]
    assert fewest_accum_steps(7, lambda size: size == 1) == 7
    assert fewest_accum_steps(7, lambda size: False) == 8


def recipe_of(**sections: object) -> Recipe:
    tree = {"data": {"path": "x", "resolution": 32, "global_batch_size": 64, "grad_accum_steps": "auto"}}
    return Recipe.model_validate(tree | {"model": {"name": "test_resnet"}} | sections)


def test_memory_of_the_machine_decides_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from train import micro_batch

    recipe, ranks = recipe_of(), Ranks(0, 1, 0, 1, CPU, 1)
    model, normalize = build_model(recipe.model, 4), Normalize((0.5,) * 3, (0.2,) * 3)

    def found(megabytes: float) -> int:
        monkeypatch.setattr(micro_batch, "usable_ram_bytes", lambda: int(megabytes * 2**20))
        return resolve_grad_accum_steps(recipe, tmp_path, model, normalize, 4, ranks)

    before = torch.get_rng_state()
    assert found(10_000) == 1
    (tmp_path / MICRO_BATCH_NAME).unlink()
    few = found(14)
    assert few > 1 and 64 % few == 0
    assert found(10_000) == few  # the run's own, from its folder
    (tmp_path / MICRO_BATCH_NAME).unlink()
    with pytest.raises(ValueError, match="not even one image of 32 px fits"):
        found(1)
    assert torch.equal(before, torch.get_rng_state()) and model.training


def test_views_take_what_they_do_not_say_from_the_headline() -> None:
    recipe = recipe_of(
        ema={"decay": 0.9},
        validation={
            "resolution": 256,
            "flip_average": True,
            "views": {"224": {"resolution": 224, "flip_average": False}, "raw": {"weights": "model"}},
        },
    )
    headline, small, raw = views_of(recipe)
    assert headline.words == "256 px, crop 0.875, flip average, ema" and headline.name == ""
    assert small.words == "224 px, crop 0.875, ema" and small.name == "224"
    assert raw.weights == "model" and raw.flip_average


def test_average_needs_its_section() -> None:
    with pytest.raises(ValueError, match="needs a section ema"):
        recipe_of(validation={"views": {"a": {"weights": "ema"}}})


def test_flip_average_is_the_mean_of_both() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images = torch.randn(2, 3, 2, 2)
    both = (model(images) + model(images.flip(3))) / 2
    torch.testing.assert_close(mean_logits(model, images, True), both)
    assert not torch.allclose(mean_logits(model, images, False), both)


def test_flops_are_those_of_resnet50_and_leave_the_model_alone() -> None:
    model = build_model(recipe_of().model.model_copy(update={"name": "resnet50"}), 1000)
    flops = flops_per_image(model, 224)
    # 4.09 G multiply-adds forward (He et al., 2016, Table 1: 3.8, without the stride's later place).
    assert flops is not None and flops / 3 == pytest.approx(2 * 4.09e9, rel=0.02)
    assert model.training and next(model.parameters()).device == CPU
    assert model_flops_utilization(1000, flops, 989e12, 1) == pytest.approx(0.0248, rel=0.02)
    assert model_flops_utilization(1000, flops, None, 1) is None


def test_tf32_rounds_and_fp32_does_not() -> None:
    try:
        set_matmul_precision("tf32")
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        set_matmul_precision("fp32")
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    for precision in ("fp32", "tf32"):
        with build_autocast(precision, CPU):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def run_like(left: float, resolutions: dict[int, int]) -> SimpleNamespace:
    """A run of 8 epochs of 10 steps, two of them done, that took 3 s each, 1 s of it for validation."""
    recipe = recipe_of(
        data={"path": "x", "resolution": resolutions}, schedule={"phases": [{"kind": "linear", "epochs": 8}]}
    )
    areas = [recipe.data.resolution_at(epoch) ** 2 for epoch in range(8)]
    seconds_per_area = 6 / sum(areas[:2])
    return SimpleNamespace(
        recipe=recipe,
        progress=SimpleNamespace(step=20, epoch=2, validation_seconds=2.0),
        budget=SimpleNamespace(seconds_left=lambda elapsed: left),
        elapsed_seconds=6.0,
        remaining_seconds=sum(areas[2:]) * seconds_per_area,
        seconds_per_area=seconds_per_area,
        num_epochs=8,
        num_steps=80,
        steps_per_epoch=10,
        schedule=SimpleNamespace(virtual_step=float),
    )


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (18.0, 80),  # all of it
        (17.9, 70),
        (9.5, 50),
        (2.0, 25),  # no epoch of 3 s: after the validation of 1 s, half of an epoch's 2 s
        (0.9, 20),  # not even a validation: the run ends here
    ],
)
def test_steps_that_a_budget_holds(left: float, expected: int) -> None:
    assert steps_in_budget(run_like(left, {0: 32})) == expected  # type: ignore[arg-type]


def test_large_images_come_sooner_in_a_shortened_run() -> None:
    # Epochs 6 and 7 have four times the pixels. In half of the six epochs to come, one is at 64 px.
    run = run_like(18.0, {0: 32, 6: 64})
    assert steps_in_budget(run) == 50  # type: ignore[arg-type]
