"""Order, crops, interpolation and loaders: pure functions of (seed, epoch, sample id), on every backend."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.manifest import ImageSettings, Manifest, load_index, load_manifest
from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from train.config import DataSection, ValidationSection
from train.data.augment import center_crops, philox4x32, random_flips, random_resized_crops
from train.data.loaders import Loader, LoaderPlan, build_loader, choose_backend
from train.data.order import epoch_order, rank_micro_batches, rank_validation_batches
from train.data.resize import resize_area
from train.distributed import Ranks

BACKENDS = [
    "reference",
    pytest.param("ffcv", marks=pytest.mark.ffcv),
    pytest.param("dali", marks=pytest.mark.dali),
]


def ranks(rank: int = 0, world_size: int = 1) -> Ranks:
    return Ranks(rank, world_size, rank, world_size, torch.device("cpu"), 1)


def section(folder: Path) -> DataSection:
    return DataSection(path=folder, global_batch_size=24, num_workers=0)


def training_plan(folder: Path, manifest: Manifest, rank: int = 0, world_size: int = 1) -> LoaderPlan:
    return LoaderPlan.training(folder, manifest, section(folder), seed=5, ranks=ranks(rank, world_size))


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    order = epoch_order(1, 2, 1000)
    assert sorted(order) == list(range(1000))
    assert np.array_equal(order, epoch_order(1, 2, 1000))
    others = [epoch_order(1, 3, 1000), epoch_order(2, 2, 1000)]
    assert all((order == other).mean() < 0.02 for other in others)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accum", [1, 2])
def test_ranks_share_each_global_batch(world_size: int, accum: int) -> None:
    order = epoch_order(0, 0, 250)
    shares = [rank_micro_batches(order, 0, 24, accum, rank, world_size) for rank in range(world_size)]
    for step in range(250 // 24):
        seen = np.concatenate([np.concatenate(s[step * accum : (step + 1) * accum]) for s in shares])
        assert sorted(seen) == sorted(order[step * 24 : (step + 1) * 24])


def test_stopped_on_two_ranks_and_taken_up_on_three() -> None:
    order = epoch_order(3, 1, 240)
    before = [ids for rank in range(2) for ids in rank_micro_batches(order, 0, 24, 1, rank, 2)[:4]]
    after = [ids for rank in range(3) for ids in rank_micro_batches(order, 96, 24, 1, rank, 3)]
    assert sorted(np.concatenate(before + after)) == list(range(240))


def test_uneven_share_is_refused() -> None:
    with pytest.raises(ValueError, match="64 cannot be shared by 3 ranks"):
        rank_micro_batches(np.arange(640), 0, 64, 1, 0, 3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 50])
def test_validation_sees_every_sample_once(world_size: int) -> None:
    batches = [
        ids for rank in range(world_size) for ids in rank_validation_batches(103, 10, rank, world_size)
    ]
    assert sorted(np.concatenate(batches)) == list(range(103))


def test_philox_known_answers() -> None:
    # Published with Random123 1.09 (kat_vectors, philox4x32 10).
    zeros = philox4x32(np.zeros((1, 4), np.uint32), (0, 0))
    assert [hex(word) for word in zeros[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    ones = philox4x32(np.full((1, 4), 0xFFFFFFFF, np.uint32), (0xFFFFFFFF, 0xFFFFFFFF))
    assert [hex(word) for word in ones[0]] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


def test_crops_depend_on_nothing_but_seed_epoch_and_id() -> None:
    ids = np.arange(500)
    widths, heights = np.full(500, 400), np.full(500, 300)
    boxes = random_resized_crops(1, 2, ids, widths, heights, (0.08, 1), (3 / 4, 4 / 3))
    backwards = random_resized_crops(1, 2, ids[::-1], widths, heights, (0.08, 1), (3 / 4, 4 / 3))
    assert np.array_equal(boxes, backwards[::-1])
    other = random_resized_crops(1, 3, ids, widths, heights, (0.08, 1), (3 / 4, 4 / 3))
    assert (boxes == other).all(1).mean() < 0.02
    assert np.array_equal(random_flips(1, 2, ids), random_flips(1, 2, ids[::-1])[::-1])


def test_crops_are_inside_and_as_distributed_as_wanted() -> None:
    generator = np.random.default_rng(0)
    widths, heights = generator.integers(5, 600, 20_000), generator.integers(5, 600, 20_000)
    boxes = random_resized_crops(0, 0, np.arange(20_000), widths, heights, (0.25, 1), (3 / 4, 4 / 3))
    top, left, height, width = boxes.T
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()
    square = random_resized_crops(
        0, 0, np.arange(20_000), np.full(20_000, 500), np.full(20_000, 500), (0.25, 1), (1, 1)
    )
    share = square[:, 2] * square[:, 3] / 500**2
    assert share.mean() == pytest.approx(0.625, abs=0.01) and share.min() < 0.27
    # A crop of half the side starts anywhere from 0 to 250, evenly.
    small = square[square[:, 2] < 270]
    assert small[:, 0].mean() == pytest.approx((500 - small[:, 2].mean()) / 2, abs=8)
    assert random_flips(0, 0, np.arange(20_000)).mean() == pytest.approx(0.5, abs=0.02)


def test_center_crop() -> None:
    assert center_crops(np.array([400, 301]), np.array([300, 500]), 0.875).tolist() == [
        [19, 69, 262, 262],
        [118, 19, 263, 263],
    ]


def test_area_interpolation_is_the_mean_of_what_is_covered() -> None:
    pixels = torch.arange(36, dtype=torch.uint8).reshape(6, 6, 1).expand(6, 6, 3).contiguous()
    expected = pixels[..., 0].float().reshape(2, 3, 2, 3).mean((1, 3)).round().to(torch.uint8)
    assert torch.equal(resize_area(pixels, 2)[..., 0], expected)
    row = torch.tensor([0, 100, 200], dtype=torch.uint8).reshape(1, 3, 1).expand(3, 3, 3).contiguous()
    # Two results of 1.5 pixels each: (0 + 100/2) / 1.5 and (100/2 + 200) / 1.5.
    assert resize_area(row, 2)[0, :, 0].tolist() == [33, 167]


@pytest.mark.parametrize(
    "size", [(150, 150, 64), (333, 401, 224), (90, 70, 128), (100, 200, 128), (64, 64, 64), (200, 200, 224)]
)
def test_area_interpolation_equals_opencv(size: tuple[int, int, int]) -> None:
    cv2 = pytest.importorskip("cv2")
    height, width, side = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    theirs = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(resize_area(torch.from_numpy(pixels), side).numpy() - theirs).max() <= 1


SIZES = [
    (306, 306, 224),
    (392, 312, 96),
    (200, 200, 224),
    (150, 200, 224),
    (500, 3, 224),
    (1, 1, 32),
    (64, 64, 64),
]


@pytest.mark.parametrize("size", [*SIZES, (300, 300, 10), (119, 58, 224), (12, 384, 96)])
@pytest.mark.parametrize("flip", [False, True])
def test_compiled_resize_equals_the_reference(size: tuple[int, int, int], flip: bool) -> None:
    compiled_resize = pytest.importorskip("train.data.compiled_resize")
    height, width, side = size
    pixels = np.random.default_rng(1).integers(0, 256, (height + 7, width + 5, 3), dtype=np.uint8)
    wanted = resize_area(torch.from_numpy(pixels[3 : 3 + height, 4 : 4 + width].copy()), side).numpy()
    image = np.zeros((side, side, 3), np.uint8)
    compiled_resize.crop_resize_flip(pixels, np.array([3, 4, height, width]), flip, image)
    # Sums in another order: a result that lies between two levels may become the other one.
    difference = np.abs((image[:, ::-1] if flip else image).astype(int) - wanted)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_loader_yields_the_planned_samples(prepared: tuple[Path, Manifest], backend: str) -> None:
    folder, manifest = prepared
    loader = build_loader(backend, training_plan(folder, manifest))
    batches = list(loader.epoch(3, resolution=32))
    loader.close()
    order = epoch_order(5, 3, 160)
    assert torch.cat([b.sample_ids for b in batches]).tolist() == order[: 6 * 24].tolist()
    labels = load_index(folder, manifest, "train")["label"]
    for batch in batches:
        assert batch.images.shape == (24, 32, 32, 3) and batch.images.dtype == torch.uint8
        assert batch.labels.tolist() == labels[batch.sample_ids.numpy()].tolist()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("resolution", [32, 128])
def test_loaders_agree_on_order_labels_and_pixels(
    prepared: tuple[Path, Manifest], backend: str, resolution: int
) -> None:
    plan = training_plan(*prepared)
    theirs, ours = (build_loader(name, plan) for name in (backend, "reference"))
    for _ in range(2):  # a second epoch, and a resolution that was not compiled for at first
        for a, b in zip(
            theirs.epoch(1, resolution=resolution), ours.epoch(1, resolution=resolution), strict=True
        ):
            assert torch.equal(a.sample_ids, b.sample_ids) and torch.equal(a.labels, b.labels)
            difference = (a.images.int() - b.images.int()).abs().float()
            assert difference.max() <= 1 and difference.mean() < 0.001
        resolution //= 2
    theirs.close()
    ours.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_epoch_is_taken_up_at_any_step(prepared: tuple[Path, Manifest], backend: str) -> None:
    loader = build_loader(backend, training_plan(*prepared))
    whole = list(loader.epoch(2, resolution=32))
    rest = list(loader.epoch(2, start_sample=72, resolution=32))
    loader.close()
    assert len(rest) == 3
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids) and torch.equal(a.images, b.images)


def read_rank_batches(plan: LoaderPlan, backend: str) -> dict[int, torch.Tensor]:
    loader = build_loader(backend, plan)
    images = {}
    for batch in loader.epoch(0, resolution=32):
        images |= dict(zip(batch.sample_ids.tolist(), batch.images, strict=True))
    loader.close()
    return images


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_are_the_same_at_any_world_size(prepared: tuple[Path, Manifest], backend: str) -> None:
    alone = read_rank_batches(training_plan(*prepared), backend)
    shared: dict[int, torch.Tensor] = {}
    for rank in range(3):
        shared |= read_rank_batches(training_plan(*prepared, rank=rank, world_size=3), backend)
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[sample_id], shared[sample_id]) for sample_id in alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_validation_loader_is_whole(prepared: tuple[Path, Manifest], backend: str, world_size: int) -> None:
    folder, manifest = prepared
    seen: list[int] = []
    for rank in range(world_size):
        plan = LoaderPlan.validation(
            folder, manifest, ValidationSection(batch_size=10), section(folder), ranks(rank, world_size)
        )
        loader = build_loader(backend, plan)
        for batch in loader.epoch(0, resolution=24):
            assert len(batch.images) == len(batch.labels)
            seen += batch.sample_ids.tolist()
        loader.close()
    assert sorted(seen) == list(range(43))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_s_warning_is_no_damage(image_folder: Path, tmp_path: Path, backend: str) -> None:
    for path in image_folder.rglob("*.jpg"):
        # Extraneous bytes before the end: kept as they are by a lossless preparation, and decoded alike.
        path.write_bytes(path.read_bytes()[:-2] + b"\x11\x22\x33\x44\x55\x66\xff\xd9")
    images = ImageSettings(encode="lossless")
    options = PrepareOptions(out=tmp_path / "data", images=images, num_workers=1, progress=False)
    manifest = prepare(open_source(image_folder), options)
    assert manifest is not None and manifest.num_quarantined == 0
    loader = build_loader(backend, training_plan(tmp_path / "data", manifest))
    assert sum(len(batch) for batch in loader.epoch(0, resolution=32)) == 24
    loader.close()
    assert not loader.damaged


def damaged(folder: Path, sample_id: int) -> tuple[Path, Manifest]:
    manifest = load_manifest(folder)
    row = load_index(folder, manifest, "train")[sample_id]
    content = bytearray((folder / "train.beton").read_bytes())
    content[int(row["offset"]) + 400 : int(row["offset"]) + 420] = bytes(20)
    (folder / "train.beton").write_bytes(content)
    return folder, manifest


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_sample_is_never_trained_on(copy_of_prepared: Callable[[], Path], backend: str) -> None:
    folder, manifest = damaged(copy_of_prepared(), 11)
    loader = build_loader(backend, training_plan(folder, manifest))
    batches = list(loader.epoch(1, resolution=32))  # epoch 1 of this seed contains sample 11
    loader.close()
    assert "CRC-32C differs" in loader.damaged[11] and len(loader.damaged) == 1
    wanted, seen = epoch_order(5, 1, 160)[:144], torch.cat([batch.sample_ids for batch in batches]).numpy()
    assert (seen != wanted).sum() == 1 and 11 not in seen and 11 in wanted
    labels = load_index(folder, manifest, "train")["label"]
    assert torch.cat([batch.labels for batch in batches]).tolist() == labels[seen].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncated_shard_is_refused_at_once(copy_of_prepared: Callable[[], Path], backend: str) -> None:
    folder = copy_of_prepared()
    manifest = load_manifest(folder)
    with (folder / "train.beton").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match="truncated"):
        build_loader(backend, training_plan(folder, manifest))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_early_leaves_no_thread(prepared: tuple[Path, Manifest], backend: str) -> None:
    loader: Loader = build_loader(backend, training_plan(*prepared))
    before = threading.active_count()
    for _ in range(3):
        for _batch in loader.epoch(0, resolution=32):
            break
    loader.close()
    assert threading.active_count() <= before


@pytest.mark.ffcv
def test_stock_ffcv_reads_our_beton(prepared: tuple[Path, Manifest]) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader as StockLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import ToTensor

    folder, manifest = prepared
    stock = StockLoader(
        str(folder / "val.beton"),
        batch_size=8,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={
            "image": [CenterCropRGBImageDecoder((32, 32), 0.875), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    images, labels = zip(*[(image.clone(), label.clone()) for image, label in stock], strict=True)
    assert torch.cat(labels).flatten().tolist() == load_index(folder, manifest, "val")["label"].tolist()
    plan = LoaderPlan.validation(folder, manifest, ValidationSection(batch_size=43), section(folder), ranks())
    loader = build_loader("ffcv", plan)
    (ours,) = loader.epoch(0, resolution=32)
    loader.close()
    # Its own decoder uses libjpeg's fast DCT.
    assert (torch.cat(images).int() - ours.images.int()).abs().float().mean() < 2


def test_auto_says_why_without_ffcv(monkeypatch: pytest.MonkeyPatch) -> None:
    import train.data.loaders as loaders

    monkeypatch.setattr(loaders, "_ffcv_fault", lambda: "FFCV is not installed")
    monkeypatch.setattr(loaders, "_dali_fault", lambda: None)
    name, reason = choose_backend("auto", "ffcv")
    assert name == "dali" and "FFCV is not installed" in reason
    with pytest.raises(ValueError, match=r"set data\.loader=auto"):
        choose_backend("ffcv", "ffcv")
    with pytest.raises(ValueError, match=r"does not read dali shards: .*one of dali, reference"):
        choose_backend("ffcv", "dali")
    monkeypatch.setattr(loaders, "_dali_fault", lambda: "DALI is not installed")
    assert choose_backend("auto", "dali")[0] == "reference"


def test_reference_workers_give_the_same_as_none(prepared: tuple[Path, Manifest]) -> None:
    plan = training_plan(*prepared)
    with_workers = read_rank_batches(replace(plan, num_workers=2), "reference")
    alone = read_rank_batches(plan, "reference")
    assert all(torch.equal(alone[sample_id], with_workers[sample_id]) for sample_id in alone)


@pytest.mark.ffcv
def test_tables_that_disagree_with_the_index_are_refused(copy_of_prepared: Callable[[], Path]) -> None:
    from data_prep.writers.beton import METADATA_DTYPE, METADATA_START

    folder = copy_of_prepared()
    manifest = load_manifest(folder)
    with (folder / "train.beton").open("r+b") as file:
        table = np.fromfile(file, METADATA_DTYPE, count=160, offset=METADATA_START)
        table["image"]["data_ptr"] = table["image"]["data_ptr"][::-1].copy()
        file.seek(METADATA_START)
        file.write(table.tobytes())
    with pytest.raises(ValueError, match="disagree about offset"):
        build_loader("ffcv", training_plan(folder, manifest))
