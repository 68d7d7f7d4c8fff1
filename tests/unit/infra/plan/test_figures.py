"""The files of figures: complete, dated, and true to the documents and to the networks themselves."""

from __future__ import annotations

import json
import re
from datetime import date

import pytest

from infra.plan.dated import MAX_AGE_DAYS, age_warning, load_dated
from infra.plan.expected import all_expected, expected_of
from infra.plan.instances import load_instances
from infra.plan.throughput import table
from infra.plan.work import REFERENCE_GMACS, _count
from tests.conftest import ROOT
from train.config import load_recipe
from train.cost import load_prices
from train.models.build import build_model
from train.multiply_adds import main as count_multiply_adds
from train.throughput import flops_per_image

RECIPES_PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_every_speed_has_bounds_a_source_and_a_date() -> None:
    for gpu, bounds in table()["gpus"].items():
        assert bounds["low"]["images_per_second"] <= bounds["high"]["images_per_second"], gpu
        for row in bounds.values():
            assert row["source"] and re.match(r"20\d\d", str(row["date"]))
            assert row["measured"] == (row["kind"] == "measured")
    assert {instance.gpu for instance in load_instances().values()} <= set(table()["gpus"])


def test_every_machine_has_a_price_or_is_known_to_have_none() -> None:
    prices = load_prices()
    assert set(load_instances()) - set(prices["usd_per_hour"]) == {"p5e.48xlarge"}
    for name, (low, high) in prices["spot_usd_per_hour"].items():
        assert 0 < low <= high < prices["usd_per_hour"][name], name
    for region, of_region in prices["other_regions"].items():
        assert set(of_region) <= set(prices["usd_per_hour"]), region


def test_expected_figures_are_those_of_the_documents() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", RECIPES_PAGE, re.MULTILINE))
    for name, expected in all_expected().items():
        assert (ROOT / "configs" / f"{name}.yaml").is_file()
        if name == "cifar10":
            assert "should reach 91–93%" in RECIPES_PAGE
            continue
        numbers = [float(text) / 100 for text in re.findall(r"(\d\d(?:\.\d+)?)(?=%|–\d\d)", rows[name])]
        high = expected.high
        assert any(abs(number - high) < 1e-9 for number in numbers), (name, numbers)
        if name == "imagenet_composer":
            assert any(abs(number - expected.low) < 1e-9 for number in numbers)
        elif name.startswith(("imagenette", "imagewoof")):
            assert expected.low == pytest.approx(high - 0.02)  # "up to two points less"
        else:
            assert expected.low == high
    assert {p.stem for p in (ROOT / "configs").glob("imagenet_*.yaml")} <= set(all_expected())


def test_measured_and_published_figures_say_so() -> None:
    for name, kind in (
        ("scenes_cpu", "measured"),
        ("imagenet_resnet50_16", "published"),
        ("imagenet_composer", "estimated"),
    ):
        expected = expected_of(name)
        assert expected is not None and expected.kind == kind and kind in str(expected)


@pytest.mark.parametrize("name", ["resnet50", "resnet10t", "inception_v3", "residual_cnn"])
def test_networks_cost_what_torch_counts(name: str) -> None:
    row = table()["networks"][name]
    library = {"inception_v3": "torchvision", "residual_cnn": "own"}.get(name, "timm")
    model = build_model(
        load_recipe(ROOT / "configs" / "demo.yaml").model.model_copy(
            update={"library": library, "name": name}
        ),
        1000,
    )
    flops = flops_per_image(model, row["at"])
    assert flops is not None and flops / 6e9 == pytest.approx(row["gmacs"], rel=0.02)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(row["params"], rel=0.02)


def test_other_networks_are_counted_by_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "configs" / "demo.yaml"
    assert count_multiply_adds([str(recipe), "model.name=resnet18", "--resolution", "224"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["gmacs"] == pytest.approx(1.82, rel=0.02) and counted["resolution"] == 224
    assert count_multiply_adds([str(recipe), "model.name=resnet999"]) == 1
    assert "resnet999" in capsys.readouterr().err
    cifar = _count(ROOT / "configs" / "cifar10.yaml", None)
    assert cifar is not None and cifar["gmacs"] > REFERENCE_GMACS  # at 224 px
    assert _count(ROOT / "configs" / "none.yaml", None) is None


def test_old_figures_are_named_with_their_age() -> None:
    assert age_warning("prices", date(2026, 1, 1), today=date(2026, 1, 1)) is None
    assert (
        age_warning(
            "prices", "2026-01-01", today=date.fromordinal(date(2026, 1, 1).toordinal() + MAX_AGE_DAYS)
        )
        is None
    )
    sentence = age_warning("prices", date(2025, 11, 30), today=date(2026, 11, 26))
    assert sentence is not None and "2025-11-30" in sentence and "361 days" in sentence
    for name in ("instances.yaml", "throughput.yaml", "expected.yaml"):
        assert isinstance(load_dated(name)["date"], date)
