"""The arithmetic of a plan: as the documents have it, and in the right direction."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.plan.estimate import Option, estimate, misfit
from infra.plan.instances import find_instance, load_instances
from infra.plan.prices import Market, price_of
from infra.plan.throughput import decoding_rate, gpu_figure, gpu_rate
from infra.plan.work import Work, work_of
from tests.conftest import ROOT
from tests.unit.test_system_pages import table_rows

CONFIGS = ROOT / "configs"
IMAGENET = sorted(CONFIGS.glob("imagenet_*.yaml"))


def option(
    recipe: str | Work, machine: str, market: Market = "on-demand", num_nodes: int = 1, *overrides: str
) -> Option:
    work = work_of(CONFIGS / f"{recipe}.yaml", list(overrides)) if isinstance(recipe, str) else recipe
    return estimate(
        work, find_instance(machine), num_nodes, price_of(machine, market), price_of(machine, "on-demand")
    )


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_training_alone_is_what_the_documents_say(path: Path) -> None:
    epochs, hours, on_demand, spot = table_rows(ROOT / "docs" / "systems" / "a_imagenet.md")[path.stem][-4:]
    there = option(path.stem, "g6.12xlarge")
    if path.stem == "imagenet_resnet50_published":  # which budget.max_hours ends
        assert there.slow.capped and not there.fast.interruptions
        assert 60 < there.slow.share * 250 < 67.3  # some epochs' worth of validation is counted, too
        assert there.slow.training + there.slow.validation == pytest.approx(26.6)
        return
    assert f"{there.work.epochs_at_224:.1f}" == epochs
    low, high = there.training_hours
    assert f"{low:.1f}–{high:.1f}" == hours
    assert "–".join(f"{usd:.0f}" for usd in there.training_usd) == on_demand
    on_spot = option(path.stem, "g6.12xlarge", "spot")
    assert "–".join(f"{usd:.0f}" for usd in on_spot.training_usd) == spot


@pytest.mark.parametrize(
    ("recipe", "minutes"), [("intel_resnet152", "6.8–11.3"), ("intel_inception_v3", "3.3–5.6")]
)
def test_other_networks_cost_by_their_multiply_adds(recipe: str, minutes: str) -> None:
    there = option(recipe, "g6.4xlarge")
    assert "–".join(f"{60 * hours:.1f}" for hours in there.training_hours) == minutes


def test_dollars_are_hours_times_prices_and_what_is_beside_them() -> None:
    there = option("imagenet_resnet50_16", "g6.12xlarge")
    parts = there.slow
    assert there.hours[1] == pytest.approx(
        parts.training + parts.validation + parts.start + parts.staging + parts.interruptions
    )
    assert there.usd[1] == pytest.approx(there.hours[1] * 4.60, rel=0.01)
    assert there.usd[1] > there.hours[1] * 4.60  # the volume, the address
    # Three views of 50,000 images, 16 times: some 6% of the training, as docs/recipes.md says.
    assert 0.05 < there.slow.validation / there.slow.training < 0.13


def test_spot_is_never_worse_than_on_demand_in_its_worst_case() -> None:
    spot, on_demand = (option("imagenet_resnet50_88", "g6.12xlarge", m) for m in ("spot", "on-demand"))
    assert spot.usd[1] < spot.worst_case_usd
    assert spot.worst_case_usd == pytest.approx(spot.hours[1] * 4.60, rel=0.01)
    assert spot.slow.interruptions > 0 == on_demand.slow.interruptions == spot.fast.interruptions
    assert on_demand.worst_case_usd == on_demand.usd[1]


@pytest.mark.parametrize("machine", load_instances())
def test_bounds_are_in_order_for_every_machine(machine: str) -> None:
    instance = find_instance(machine)
    assert 0 < gpu_rate(instance, "slow") <= gpu_rate(instance, "fast")
    assert 0 < decoding_rate(instance, "slow") <= decoding_rate(instance, "fast")
    for market in ("on-demand", "spot"):
        assert instance.quota(market)[0].startswith("L-")  # type: ignore[arg-type]


def test_more_work_takes_longer_and_more_nodes_are_quicker_but_dearer() -> None:
    short, long = (option(f"imagenet_resnet50_{epochs}", "g6.12xlarge") for epochs in (16, 88))
    assert short.hours[0] < long.hours[0] and short.usd[1] < long.usd[1]
    one, two, four = (option("imagenet_resnet50_88", "g6.12xlarge", "on-demand", n) for n in (1, 2, 4))
    assert one.hours[0] > two.hours[0] > four.hours[0] and one.hours[1] > two.hours[1] > four.hours[1]
    assert one.usd[0] < two.usd[0] < four.usd[0]
    assert two.training_hours[1] > one.training_hours[1] / 2  # no node helps as much as the first
    larger = option("imagenet_resnet50_16", "g6.12xlarge", "on-demand", 1, "data.resolution=320")
    assert larger.hours[0] > short.hours[0]


def test_a_lone_gpus_figure_does_not_scale_fully() -> None:
    assert gpu_rate(find_instance("p5.4xlarge"), "fast") == 3926
    assert gpu_rate(find_instance("p5.48xlarge"), "fast") == pytest.approx(0.84 * 8 * 3926)
    assert gpu_rate(find_instance("p4d.24xlarge"), "fast") == 8 * 2078  # taken with eight


def test_validation_is_a_third_of_a_step_for_each_view_and_mirror_image() -> None:
    work = work_of(CONFIGS / "imagenet_resnet50_16.yaml")  # 256 px twice, 256 px, 224 px
    assert work.validation_images == pytest.approx(16 * 50_000 * (3 * (256 / 224) ** 2 + 1) / 3)


def test_the_bottleneck_is_named() -> None:
    assert option("imagenet_resnet50_88", "g6.12xlarge").bottleneck == "GPU"
    assert option("imagenet_resnet50_88", "g6e.xlarge").bottleneck == "decoding"  # an L40S on two cores
    assert option("imagenet_resnet50_88", "g6.xlarge", "spot", 4).bottleneck == "network"
    assert option("imagenette_128_5", "g6.xlarge").bottleneck == "start"


def test_a_slow_network_makes_staging_the_bottleneck() -> None:
    work = work_of(CONFIGS / "imagenette_128_5.yaml")
    data = dataclasses.replace(work.data, num_bytes=200e9)
    assert option(dataclasses.replace(work, data=data), "g6.xlarge").bottleneck == "staging"


def test_data_fit_memory_or_disks_or_not() -> None:
    work = work_of(CONFIGS / "imagenet_resnet50_16.yaml")
    assert option(work, "g6.12xlarge").fits_ram and option(work, "g6.12xlarge").fits_nvme
    small = option(work, "g6.xlarge")
    assert not small.fits_ram and small.fits_nvme and misfit(work, small.instance, 1) is None
    lossless = dataclasses.replace(work, data=dataclasses.replace(work.data, num_bytes=136e9))
    assert "do not fit" in str(misfit(lossless, find_instance("g4dn.xlarge"), 1))
    assert misfit(lossless, find_instance("g6.xlarge"), 1) is None


def test_a_step_has_to_be_dealt_out_evenly() -> None:
    work = work_of(CONFIGS / "rocks_cpu.yaml")  # 24 images a step
    assert misfit(work, find_instance("g6.12xlarge"), 2) is None
    assert "16 GPUs" in str(misfit(work, find_instance("g6.48xlarge"), 2))


def test_small_steps_do_not_fill_many_gpus() -> None:
    one, eight = (option("imagenette_128_80", machine) for machine in ("g6.xlarge", "g6.48xlarge"))
    assert eight.training_hours[1] > one.training_hours[1] / 4  # 8 images a GPU


def test_sizes_come_from_the_manifest_where_there_is_one(tiny_data: Path) -> None:
    work = work_of(CONFIGS / "imagenet_resnet50_16.yaml", data=str(tiny_data))
    assert work.data.measured and work.data.num_train == 160 and work.data.num_bytes < 100e6
    folds = work_of(CONFIGS / "imagenet_resnet50_16.yaml", ["data.folds=2", "data.fold=0"], str(tiny_data))
    assert folds.data.num_train == -(-work.data.num_train // 2)


def test_unknown_data_and_machines_are_sentences(tmp_path: Path) -> None:
    recipe = CONFIGS / "imagenet_resnet50_16.yaml"
    with pytest.raises(UserError, match="--data"):
        work_of(recipe, ["data.path=s3://bucket/mine"])
    with pytest.raises(UserError, match="manifest"):
        work_of(recipe, data=str(tmp_path))
    with pytest.raises(UserError, match=r"did you mean g6\.12xlarge"):
        find_instance("g6.12xlarg")
    with pytest.raises(UserError, match="did you mean"):
        work_of(recipe, ["data.resolutoin=3"])


def test_only_what_was_measured_here_says_so() -> None:
    assert gpu_figure("H100", "fast").measured and gpu_figure("H100", "fast").images_per_second == 3926
    assert "3,926" in (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    one, eight = (option("imagenet_resnet50_16", f"p5.{size}") for size in ("4xlarge", "48xlarge"))
    assert one.speed_kinds == ("estimated", "measured") and one.measured["speed_fast"]
    assert eight.speed_kinds == ("estimated", "estimated") and not eight.measured["speed_fast"]
    assert option("imagenet_resnet50_16", "g6.12xlarge").speed_kinds == ("published", "estimated")
