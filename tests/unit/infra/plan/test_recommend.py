"""Which machine is recommended, and what the command says and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.__main__ import main
from infra.errors import UserError
from infra.plan import Option, Plan, plan
from infra.plan.recommend import is_p
from infra.plan.table import WIDTH, render, worth_a_look
from tests.conftest import ROOT

RECIPE = ROOT / "configs" / "imagenet_resnet50_16.yaml"


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def middle(option: Option) -> float:
    return sum(option.usd) / 2


def test_the_cheapest_that_keeps_to_the_limits_is_recommended() -> None:
    found = plan(RECIPE, max_usd=25, max_hours=6)
    best = found.recommended
    assert best is not None and best.usd[1] <= 25 and best.hours[1] <= 6
    within = [o for o in found.options if o.usd[1] <= 25 and o.hours[1] <= 6]
    assert all(middle(best) <= middle(option) for option in within)
    assert f"{len(within)} of {len(found.options)}" in found.reason
    assert any(middle(option) > middle(best) for option in within)


def test_tighter_limits_never_make_it_cheaper() -> None:
    costs = []
    for hours in (30.0, 6.0, 1.2):
        found = plan(RECIPE, max_hours=hours, markets=["on-demand"])
        assert found.recommended is not None and found.recommended.hours[1] <= hours
        costs.append(middle(found.recommended))
    assert costs == sorted(costs) and costs[0] < costs[-1]


def test_p_instances_have_a_stand_in_without_their_quota() -> None:
    found = plan(RECIPE)
    assert found.recommended is not None and is_p(found.recommended)
    other, hurry = found.alternatives["without P"], found.alternatives["without P, in a hurry"]
    assert not is_p(other) and not is_p(hurry)
    assert middle(other) < middle(hurry) and hurry.hours[1] < other.hours[1]
    assert "for P slow to be raised" in " ".join("\n".join(render(found)).split())


def test_nothing_that_fits_says_what_to_change() -> None:
    found = plan(RECIPE, max_usd=1, max_hours=2)
    assert found.recommended is None and not found.alternatives
    assert "--max-usd" in found.reason and "budget.shorten" in found.reason
    raised = float(found.reason.split("--max-usd ")[1].split()[0])
    assert plan(RECIPE, max_usd=raised, max_hours=2).recommended is not None
    assert "NOTHING FITS" in "\n".join(render(found))


def test_a_target_chooses_among_recipes() -> None:
    found = plan(target_top1=0.76, max_usd=60, instance_types=["g6.12xlarge"], num_nodes=[1])
    assert found.recommended is not None and found.recommended.work.name == "imagenet_resnet50_32"
    names = {work.name for work in found.works}
    assert "imagenet_resnet50_16" not in names and "imagenet_resnet50_88" in names
    assert plan(ROOT / "configs", target_top1=0.76).recommended is not None
    with pytest.raises(UserError, match=r"imagenet_composer with 78\.5–79\.5%"):
        plan(target_top1=0.9)
    with pytest.raises(UserError, match="known data sets: cifar10, imagenet"):
        plan(target_top1=0.5, data_set="mine")
    assert plan(target_top1=0.9, data_set="imagenette").recommended is not None


def test_a_recipe_below_the_target_is_not_recommended() -> None:
    found = plan(RECIPE, target_top1=0.76)
    assert found.recommended is None and "73.8%" in found.reason and "leave the recipe out" in found.reason


def test_a_changed_recipe_says_that_its_accuracy_was_not_meant() -> None:
    changed = plan(RECIPE, ["schedule.phases.0.epochs=14", "run.name=mine"], instance_types=["g6.12xlarge"])
    sentence = next(text for text in changed.warnings if "as it is" in text)
    assert "schedule.phases.0.epochs=14" in sentence and "run.name" not in sentence
    harmless = plan(RECIPE, ["run.name=mine"], instance_types=["g6.12xlarge"])
    assert not any("as it is" in text for text in harmless.warnings)


def test_machines_that_cannot_be_used_are_named() -> None:
    found = plan(RECIPE, region="eu-central-1")
    assert all(option.market == "on-demand" for option in found.options)
    assert any("g6.12xlarge has no spot price in eu-central-1" in sentence for sentence in found.left_out)
    assert any(sentence.startswith("p5e.48xlarge has no price") for sentence in plan(RECIPE).left_out)
    with pytest.raises(UserError, match=r"no prices of mars-1.*--live"):
        plan(RECIPE, region="mars-1")
    with pytest.raises(UserError, match="no machine can run this"):
        plan(RECIPE, instance_types=["p5e.48xlarge"])


def test_a_machine_on_which_a_limit_of_the_recipe_ends_it_early_is_left_out() -> None:
    found = plan(ROOT / "configs" / "imagenet_resnet50_published.yaml", num_nodes=[1])
    machines = {option.instance.name for option in found.options}
    assert "g6.12xlarge" in machines and "g6.xlarge" not in machines
    assert any("g6.xlarge is ended by budget.max_hours=26.6 after" in text for text in found.left_out)


def test_rows_are_those_that_nothing_beats() -> None:
    found = plan(RECIPE)
    rows = worth_a_look(found)
    assert found.recommended in rows
    assert {("g6.12xlarge", "spot"), ("g6.12xlarge", "on-demand")} <= {
        (row.instance.name, row.market) for row in rows
    }  # the recipe's own machine
    own = [row for row in rows if row.instance.name != "g6.12xlarge"]
    for row in own:
        if row not in found.alternatives.values() and row is not found.recommended:
            better = [o for o in found.options if middle(o) < middle(row) and sum(o.hours) < sum(row.hours)]
            assert not better


@pytest.mark.parametrize("show_all", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_the_page_begins_with_the_recommendation_and_fits(several: bool, show_all: bool) -> None:
    found: Plan = plan(target_top1=0.75, max_usd=25) if several else plan(RECIPE, max_usd=25)
    lines = render(found, show_all)
    too_long = [line for line in lines if len(line) > WIDTH]
    assert WIDTH == 110 and not too_long
    first = next(i for i, line in enumerate(lines) if line.startswith("RECOMMENDED"))
    assert first < next(i for i, line in enumerate(lines) if "machines " in line) and first <= 4
    text = "\n".join(lines)
    assert "at worst" in text and "measured" in text and "published" in text and "estimated" in text
    marked = [line for line in lines if line.startswith("▸")]
    assert len(marked) == 1
    if show_all:
        assert sum(" × " in line and "$" in line for line in lines) >= len(found.options)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_prints_json_with_its_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, str(RECIPE), "--json", "--offline", "--max-usd", "25")
    facts: dict[str, Any] = json.loads(out)
    assert code == 0 and facts["recommended"] is not None and facts["region"] == "us-east-1"
    machine = next(
        o
        for o in facts["options"]
        if (o["instance_type"], o["market"], o["num_nodes"]) == ("g6.12xlarge", "on-demand", 1)
    )
    assert machine["training_hours"] == pytest.approx([2.15, 3.58], abs=0.01)
    images = facts["recipes"][0]["epochs_at_224"] * facts["recipes"][0]["data"]["num_train"]
    slow = machine["slow"]
    assert images / slow["gpu_images_per_second"] / 3600 == pytest.approx(machine["training_hours"][1])
    assert slow["one_gpu"]["source"] and slow["one_gpu"]["measured"] is False
    assert machine["price"]["usd_per_hour"] == 4.6 and machine["quota"]["code"] == "L-DB2E81BA"
    assert machine["fits_ram"] and machine["fits_nvme"] and machine["bottleneck"] == "GPU"
    assert facts["recipes"][0]["expected_top1"]["low"] == 0.738 and facts["assumptions"]


def test_the_command_says_faults_and_ends_with_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, str(RECIPE), "--offline", "--max-usd", "1")
    assert code == 1 and "NOTHING FITS" in out
    code, _, err = run(capsys, str(tmp_path / "none.yaml"), "--offline")
    assert code == 1 and "there is no such file" in err
    code, _, err = run(capsys, str(RECIPE), "--offline", "--instance-type", "g6.12xlarg")
    assert code == 1 and "did you mean g6.12xlarge" in err
    code, out, _ = run(capsys, "data.global_batch_size=512", "--offline", "--target-top1", "76%")
    assert code == 0 and "RECOMMENDED" in out
    for words in (["--max-usd", "0"], ["--target-top1", "76"]):
        with pytest.raises(SystemExit):
            run(capsys, str(RECIPE), *words)


def test_data_of_the_user_are_measured(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, str(RECIPE), "--offline", "--json", "--data", str(tiny_data))
    data = json.loads(out)["recipes"][0]["data"]
    assert code == 0 and data["measured"] and data["num_train"] == 160
