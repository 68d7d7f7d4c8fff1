"""Preflight: what limits a training, told from figures; and the figures, measured without leaving a trace."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.manifest import ImageSettings, Manifest, load_index
from tests.conftest import class_image
from tests.integration.launch import write_recipe
from train.config import Recipe
from train.data.batch import Normalize
from train.data.loaders import Loader, LoaderPlan, build_loader
from train.data.preflight import quick_preflight, training_resolutions
from train.data.preflight.__main__ import main
from train.data.preflight.command import preflight
from train.data.preflight.figures import (
    Figures,
    Lever,
    Rates,
    epoch_seconds,
    epochs_by_resolution,
    expected_rate,
)
from train.data.preflight.levers import candidates, preparation_levers
from train.data.preflight.machine import ColdRead, free_bytes, read_cold, share_of_cores, usable_ram_bytes
from train.data.preflight.measure import Step, loader_rate, model_rate, shortened
from train.data.preflight.verdict import limit_of, loading_matters, quick_verdict, verdict
from train.distributed import Ranks
from train.models.build import build_model

GB = 10**9
Q90 = Lever("to prepare again with `--encode q90`", 1.3, "measured on 200 samples: 1.5 times", True, 0.5)
CAP = Lever(
    "to prepare again with `--resolution-cap 400`", 2.5, "measured on 200 samples: 3 times", True, 0.4
)
NATIVE = Lever("data.loader=native", 1.8, "measured: 1.8 times as fast", False)


def figures(*rates: Rates, **changes: object) -> Figures:
    """Four ranks with a GPU and four cores each, and data that fit the memory."""
    known = Figures(
        num_ranks=4,
        num_cores=4,
        num_workers=4,
        shares_cores=False,
        num_train=1_000_000,
        num_val=50_000,
        validate_every_epochs=1,
        data_bytes=100 * GB,
        training=rates or (Rates(224, 16, 1150, 2400),),
        usable_ram_bytes=190 * GB,
        disk_images_per_second=2000,
        disk_bytes_per_second=200e6,
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def test_data_bound_names_both_speeds_and_how_many_cores_would_do() -> None:
    sentence = verdict(figures())
    assert sentence.startswith("data-bound at 224 px: the model takes 2,400 images/s a GPU")
    assert "the loader gives 1,150 with 4 cores" in sentence
    assert "5 more cores a GPU (estimated) would close it" in sentence  # 2400 / (1150 / 4) = 8.3 cores


def test_data_bound_names_the_least_change_that_closes_the_gap() -> None:
    sentence = verdict(figures(levers=(NATIVE, Q90, CAP)))
    closing, helping = sentence.split(" would close it")
    assert "`--resolution-cap 400` (measured on 200 samples: 3 times, so about 2,875 images/s)" in closing
    assert "data.loader=native" in helping and "about 2,070" in helping
    assert "q90" not in sentence  # it would not be enough, and the cap is
    assert "q90" in verdict(figures(levers=(replace(Q90, speedup=2.2), CAP)))


def test_data_bound_by_the_recipes_own_number_of_workers() -> None:
    sentence = verdict(figures(Rates(224, 16, 900, 2400), num_cores=8, num_workers=2))
    assert "with 2 cores: data.num_workers=8, all that a rank has would close it" in sentence
    assert "more core" not in sentence


def test_model_bound_says_how_few_cores_suffice() -> None:
    sentence = verdict(figures(Rates(224, 16, 3100, 1000), num_cores=12, num_workers=12))
    assert sentence.startswith("model-bound at 224 px: the model takes 1,000 images/s a GPU")
    assert "3.1 times that with 12 cores" in sentence and "(4 a GPU suffice, estimated)" in sentence
    alone = verdict(figures(Rates(224, 16, 310, 200), num_cores=1, num_workers=1))
    assert limit_of(alone) == "model-bound" and "cheaper" not in alone and "1 core:" in alone


@pytest.mark.parametrize("loader", [2190, 2400, 2630])
def test_balanced_within_ten_percent(loader: float) -> None:
    assert limit_of(verdict(figures(Rates(224, 16, loader, 2400)))) == "balanced"


@pytest.mark.parametrize(("loader", "limit"), [(2100, "data-bound"), (2700, "model-bound")])
def test_not_balanced_beyond_ten_percent(loader: float, limit: str) -> None:
    assert limit_of(verdict(figures(Rates(224, 16, loader, 2400)))) == limit


def test_the_resolution_that_costs_most_time_decides() -> None:
    low, high = Rates(128, 10, 2000, 8000), Rates(224, 6, 1800, 2400)
    sentence = verdict(figures(low, high))
    assert sentence.startswith("data-bound at 128 px (10 of 16 epochs)") and "8,000" in sentence
    # One such epoch among many of another kind: hardly anything is lost.
    rare = verdict(figures(replace(low, epochs=1), Rates(224, 99, 5000, 1000)))
    assert limit_of(rare) != "data-bound"


def test_disk_bound_says_what_is_read_and_what_disk_or_memory_would_do() -> None:
    slow = figures(Rates(224, 16, 5000, 2400), usable_ram_bytes=60 * GB, levers=(Q90,))
    sentence = verdict(slow)
    assert sentence.startswith("disk-bound at 224 px: every epoch reads 49.0 GB of 100.0 GB")
    assert "200 MB/s" in sentence and "118 GB of memory" in sentence and "2,400" in sentence
    assert "`--encode q90` (about 50.0 GB, which fits)" in sentence
    # 2,400 images/s × 4 GPUs × 49% uncached × 100 kB an image
    assert "a disk of 470 MB/s" in sentence
    assert limit_of(verdict(replace(slow, usable_ram_bytes=None))) == "model-bound"
    assert limit_of(verdict(replace(slow, disk_images_per_second=None))) == "model-bound"  # not known


def test_cpu_training_shares_its_cores() -> None:
    model = verdict(figures(Rates(64, 16, 1900, 210), shares_cores=True, num_cores=2))
    assert model.startswith("model-bound at 64 px: loader and model share 2 cores")
    assert "1,900" in model and "210" in model and "together about 189" in model and "90%" in model
    data = verdict(figures(Rates(64, 16, 200, 1800), shares_cores=True, levers=(CAP,)))
    assert limit_of(data) == "data-bound" and "together about 180" in data
    assert "--resolution-cap 400" in data and "together about 391" in data
    both = verdict(figures(Rates(64, 16, 400, 400), shares_cores=True))
    assert limit_of(both) == "balanced" and "50%" in both


def test_no_verdict_without_the_model() -> None:
    sentence = verdict(figures(Rates(224, 16, 1000, None)))
    assert sentence.startswith("no verdict") and limit_of(sentence) is None
    assert epoch_seconds(figures(Rates(224, 16, 1000, None))) is None


def test_levers_are_tried_only_where_loading_matters() -> None:
    assert loading_matters(figures())
    assert not loading_matters(figures(Rates(224, 16, 5000, 2400)))
    assert not loading_matters(figures(Rates(224, 16, 5000, None)))
    assert loading_matters(figures(Rates(224, 16, 5000, 2400), shares_cores=True))


def test_expected_rates_and_times() -> None:
    gpu = figures()
    assert expected_rate(gpu, gpu.training[0]) == 1150
    shared = replace(gpu, shares_cores=True)
    assert expected_rate(shared, gpu.training[0]) == pytest.approx(1 / (1 / 1150 + 1 / 2400))
    assert epoch_seconds(gpu) == pytest.approx(1_000_000 / (4 * 1150))
    with_validation = replace(gpu, validation=Rates(256, 1, 1000, 5000), validate_every_epochs=5)
    assert epoch_seconds(with_validation) == pytest.approx(1_000_000 / 4600 + 50_000 / 4000 / 5)
    # Cold, a thread that waits for the disk does not decode: 500 images/s a rank from it, and 1,150 decoded.
    assert epoch_seconds(gpu, first=True) == pytest.approx(1_000_000 / 4 * (1 / 500 + 1 / 1150))
    two = figures(Rates(128, 12, 4000, 2000), Rates(224, 4, 4000, 1000))
    assert epoch_seconds(two) == pytest.approx(1_000_000 / 4 * (0.75 / 2000 + 0.25 / 1000))


def test_quick_line() -> None:
    line = quick_verdict(figures(usable_ram_bytes=60 * GB), None)
    assert line.startswith("preflight: loader 1,150 images/s, model 2,400 at 224 px on this rank: data-bound")
    assert "RECIPE says what to change" in line and "100.0 GB of shards do not fit the memory" in line
    assert "\n" not in line
    failed = quick_verdict(figures(Rates(224, 1, 1150, None)), "no room")
    assert "not measured (no room)" in failed and "fit the memory" in failed
    shared = quick_verdict(figures(Rates(64, 1, 1900, 210), shares_cores=True, data_bytes=84_000_000), None)
    assert "about 189 together: model-bound; 84.0 MB of shards fit the memory" in shared


def recipe_of(folder: Path, **data: object) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"path": str(folder), "loader": "reference", "num_workers": 0, "global_batch_size": 24}
            | {"resolution": 32}
            | data,
            "model": {"name": "test_resnet"},
            "precision": {"mode": "fp32"},
        }
    )


def test_resolutions_of_a_recipe(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert training_resolutions(recipe) == [32] and epochs_by_resolution(recipe) == {32: 16}
    # Not through validation: the mapping is what counts here.
    progressive = recipe.data.model_copy(update={"resolution": {0: 128, 5: 160, 10: 192, 12: 160, 40: 999}})
    recipe = recipe.model_copy(update={"data": progressive})
    assert training_resolutions(recipe) == [128, 160, 192]
    assert epochs_by_resolution(recipe) == {128: 5, 160: 9, 192: 2}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = "MemTotal:  16000000 kB\nMemFree:  100 kB\nMemAvailable:    8000000 kB\n"
V1_UNLIMITED = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("own", "files", "usable"),
    [
        ("0::/\n", {}, 8_192_000_000),
        ("0::/box\n", {"box/memory.max": "max\n"}, 8_192_000_000),
        ("0::/box\n", {"box/memory.max": "4000000000\n"}, 4_000_000_000),
        # What processes hold is gone; the rest of what counts against the limit is page cache.
        (
            "0::/box\n",
            {"box/memory.max": "4000000000", "box/memory.stat": "anon 1000000000\nfile 2900000000\n"},
            3_000_000_000,
        ),
        # The limit of the slice around it counts, too.
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "2000000000"}, 2_000_000_000),
        # In a container the path is that of outside, and the limit lies at the root.
        ("0::/../outside\n", {"memory.max": "1000000000"}, 1_000_000_000),
        ("4:memory:/docker/12ab\n", {"memory/memory.limit_in_bytes": "1500000000"}, 1_500_000_000),
        (
            "5:cpu:/\n4:memory:/job\n",
            {
                "memory/job/memory.limit_in_bytes": "3000000000",
                "memory/job/memory.stat": "rss 1\ntotal_rss 500000000\n",
                "memory/memory.limit_in_bytes": V1_UNLIMITED,
            },
            2_500_000_000,
        ),
    ],
)
def test_usable_memory_is_that_of_the_narrowest_limit(
    tmp_path: Path, own: str, files: dict[str, str], usable: int
) -> None:
    proc = write_tree(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": own})
    assert usable_ram_bytes(proc, write_tree(tmp_path / "cgroup", files)) == usable


def test_usable_memory_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert usable_ram_bytes(tmp_path, tmp_path) is None
    assert usable_ram_bytes() is None or usable_ram_bytes() > 1 << 20  # type: ignore[operator]


def test_a_ranks_cores_are_whole_ones(tmp_path: Path) -> None:
    siblings = {f"cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}\n" for n in range(8)}
    assert share_of_cores(range(8), 4, write_tree(tmp_path, siblings)) == {0, 4, 1, 5}
    assert share_of_cores([2, 3, 5], 2, tmp_path / "none") == {2, 3}


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0


def test_cold_read_counts_what_it_read(
    prepared: tuple[Path, Manifest],
) -> None:
    folder, manifest = prepared
    index = load_index(folder, manifest, "train")
    shards = [folder / shard.name for shard in manifest.splits["train"].shards]
    cold = read_cold(shards, index, num_threads=2, seconds=10)
    assert (cold.num_images, cold.num_bytes) == (len(index), int(index["length"].sum()))
    assert cold.images_per_second > 0 and (cold.fault is None or "page cache" in cold.fault)
    none = read_cold(shards, index[:0], num_threads=2, seconds=10)
    assert none.num_images == 0 and none.fault


def test_every_sample_is_dropped_from_the_page_cache_before_it_is_read(
    prepared: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = prepared
    index = load_index(folder, manifest, "train")
    shards = [folder / shard.name for shard in manifest.splits["train"].shards]
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, begin, length, advice: dropped.append((begin, begin + length))
    )
    read_cold(shards, index, num_threads=1, seconds=10)
    for row in index:
        begin, end = int(row["offset"]), int(row["offset"]) + int(row["length"])
        assert any(first <= begin < last for first, last in dropped)
        assert any(first < end <= last for first, last in dropped)
    assert all(first % (2 << 20) == last % (2 << 20) == 0 for first, last in dropped)  # whole folios


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no file system in memory")
def test_a_file_in_memory_has_no_disk_speed(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    index = load_index(folder, manifest, "train")
    shard = folder / manifest.splits["train"].shards[0].name
    copy = Path("/dev/shm") / f"preflight-{os.getpid()}"
    try:
        copy.write_bytes(shard.read_bytes())
        cold = read_cold([copy], index, num_threads=1, seconds=10)
    finally:
        copy.unlink(missing_ok=True)
    assert cold.fault and "stayed in the page cache" in cold.fault


def jpegs(num: int, width: int, height: int, quality: int) -> list[bytes]:
    import io

    made = []
    for seed in range(num):
        stream = io.BytesIO()
        class_image(seed % 4, seed, width, height).save(stream, "JPEG", quality=quality)
        made.append(stream.getvalue())
    return made


def test_candidates_leave_room_for_the_largest_crop() -> None:
    words = [word for word, _ in candidates(ImageSettings(encode="lossless"), 224, [500] * 9)]
    assert words == ["`--encode q90`", "`--encode q90` and `--resolution-cap 400`"]
    caps = [settings.resolution_cap for _, settings in candidates(ImageSettings(), 128, [500] * 9)]
    assert caps == [400, 320]
    shortest = ImageSettings(cap_side="shortest", resolution_cap=None)
    assert [settings.resolution_cap for _, settings in candidates(shortest, 224, [500] * 9)] == [400, 320]
    assert candidates(ImageSettings(), 320, [500] * 9) == []
    assert candidates(ImageSettings(), 64, [96] * 9) == []  # hardly any image is larger than the least cap
    assert candidates(ImageSettings(resolution_cap=400), 128, [400] * 9)[0][1].resolution_cap == 320


def test_preparation_levers_are_measured_on_the_samples() -> None:
    large = jpegs(6, 500, 375, 98)
    levers = preparation_levers(large, ImageSettings(encode="lossless"), 128, core_rate=100.0)
    assert levers[-1].change == "to prepare again with `--encode q90` and `--resolution-cap 320`"
    assert levers[-1].bytes_ratio < 0.5 and levers[-1].speedup > 1
    assert "measured on 6 samples" in levers[-1].evidence
    # A loader whose time goes elsewhere gains nothing from fewer pixels to decode.
    slow = preparation_levers(large, ImageSettings(encode="lossless"), 128, core_rate=0.001)
    assert slow[-1].speedup == pytest.approx(1, abs=0.01)


def test_model_rate_grows_to_the_recipes_batch_and_shares_out_the_update() -> None:
    sizes: list[int] = []

    def build(size: int) -> Step:
        sizes.append(size)
        return Step(lambda: None, lambda: time.sleep(0.004), accum_steps=2)

    rate = model_rate(build, 64, torch.device("cpu"), seconds=0.02)
    assert sizes == [4, 16, 64]  # quick steps: up to the recipe's own micro-batch
    assert rate < 2 * 64 / 0.004  # an update every two micro-batches, and nothing beside it takes time

    def slow(size: int) -> Step:
        sizes.append(size)
        return Step(lambda: time.sleep(0.004 * size), lambda: None)

    sizes.clear()
    model_rate(slow, 64, torch.device("cpu"), seconds=0.04)
    assert sizes[-1] < 64  # a whole micro-batch would take a quarter of a second


def test_cuda_rate_counts_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    done = []
    step = Step(lambda: done.append("compute"), lambda: done.append("update"), accum_steps=3)
    rate = model_rate(lambda size: step, 8, torch.device("cuda"), seconds=0.01)
    assert rate > 0 and done.count("compute") == 3 * done.count("update")
    assert done[:4] == ["compute"] * 3 + ["update"]


@pytest.fixture
def loader(prepared: tuple[Path, Manifest]) -> Iterator[Loader]:
    folder, manifest = prepared
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), 1)
    built = build_loader("reference", LoaderPlan.training(folder, manifest, recipe_of(folder).data, 0, ranks))
    yield built
    built.close()


def test_shortened_plan_keeps_the_ranks_share(loader: Loader) -> None:
    plan = replace(
        loader.plan, batch_size=1024, global_batch_size=8192, world_size=4, grad_accum_steps=2, num_workers=0
    )
    short = shortened(plan)
    assert 8 <= short.batch_size < 64 and short.global_batch_size == 8 * short.batch_size
    assert shortened(replace(plan, batch_size=4, global_batch_size=32)).batch_size == 4


def test_loader_rate_is_that_of_its_images(loader: Loader) -> None:
    assert 0 < loader_rate(loader, 32, seconds=0.05, num_windows=1) < 1e6


def test_quick_preflight_leaves_no_trace(loader: Loader, prepared: tuple[Path, Manifest]) -> None:
    recipe = recipe_of(prepared[0])
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), 1)
    model = build_model(recipe.model, 4)
    normalize = Normalize((0.5,) * 3, (0.2,) * 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads, processes = threading.active_count(), len(multiprocessing.active_children())
    torch.manual_seed(3)
    generator = torch.get_rng_state()

    line = quick_preflight(recipe, ranks, loader, model, normalize, resolution=32, seconds=0.1)

    assert (
        line.startswith("preflight: loader ") and " at 32 px on this rank" in line and " together: " in line
    )
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training and threading.active_count() == threads
    assert len(multiprocessing.active_children()) == processes
    batch = next(iter(loader.epoch(0, resolution=32)))  # the epoch begins where it would have begun
    fresh = build_loader("reference", loader.plan)
    assert np.array_equal(batch.sample_ids, next(iter(fresh.epoch(0, resolution=32))).sample_ids)
    fresh.close()


def test_quick_preflight_survives_a_model_that_fails(loader: Loader, prepared: tuple[Path, Manifest]) -> None:
    class Failing(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    line = quick_preflight(
        recipe_of(prepared[0]),
        Ranks(0, 1, 0, 1, torch.device("cpu"), 1),
        loader,
        Failing(2, 2),
        Normalize((0.5,) * 3, (0.2,) * 3),
        resolution=32,
        seconds=0.1,
    )
    assert "the model was not measured (there is no memory for a copy" in line


def test_a_model_without_memory_is_a_sentence_with_a_remedy(
    prepared: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

    monkeypatch.setattr("train.data.preflight.command.model_rate", fail)
    monkeypatch.setattr(
        "train.data.preflight.command.read_cold", lambda *_: ColdRead(1, 1, 1.0, "not looked at")
    )
    cores = os.sched_getaffinity(0)
    try:
        fault = preflight(recipe_of(prepared[0]), None, 0.05, None)
    finally:
        os.sched_setaffinity(0, cores)
    assert fault is not None and "runs out of memory at 32 px" in fault and "grad_accum_steps=2" in fault
    assert "no verdict" in capsys.readouterr().out


def test_a_mistyped_location_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no path, and no s3://"):
        preflight(recipe_of(Path("s3://bucket/set")), None, 1.0, None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["model.name=resnot50"], "did you mean"),
        (["data.pth=x"], "unknown key"),
        (["data.path=nothing/here"], "does not exist"),
        (["--nproc-per-node", "7"], "cannot be shared by 7 ranks"),
        (["data.global_batch_size=5000"], "fewer than one step"),
        (["budget.instance_type=p9.huge"], "no price"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    changes: list[str],
    told: str,
    prepared: tuple[Path, Manifest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cores = os.sched_getaffinity(0)
    recipe = write_recipe(tmp_path, prepared[0])
    assert main([str(recipe), *changes, "--seconds", "0.05"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("error: ") == 1
    assert os.sched_getaffinity(0) == cores
