"""Damaged shards, before and under a running job: no garbage pixel in any batch, and nothing hidden."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_prep.manifest import Manifest, load_index, load_keys, load_manifest
from tests.unit.train.loader_cases import (
    CASES,
    NUM_TRAIN,
    NUM_VAL,
    SEED,
    Case,
    ForgetfulReader,
    PickyReader,
    Seen,
    UnreadableReader,
    UntracedPickyReader,
    consume,
    long_but,
    read,
    read_with,
    same,
    training,
    validation,
)
from train.data.loaders import build_loader
from train.data.order import epoch_order
from train.data.samples import SampleReader

Prepared = tuple[Path, Manifest]
Copy = Callable[[], Path]
STRETCH = 64 << 10
each_loader = pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))


@dataclass(frozen=True)
class Shard:
    """The only shard of a split in a copy that may be damaged; each damage returns the ids that it hits."""

    folder: Path
    manifest: Manifest
    split: str

    @classmethod
    def of(cls, folder: Path, split: str = "train") -> Shard:
        return cls(folder, load_manifest(folder), split)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.split}.beton"

    @property
    def index(self) -> np.ndarray:
        return load_index(self.folder, self.manifest, self.split)  # type: ignore[arg-type]

    def write(self, offset: int, content: bytes) -> set[int]:
        """Overwrite in place."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(content)
        return self.within(offset, offset + len(content))

    def within(self, begin: int, end: int) -> set[int]:
        first, last = self.index["offset"], self.index["offset"] + self.index["length"]
        return set(np.flatnonzero((first < end) & (last > begin)).tolist())

    def zero_in(self, sample_id: int) -> set[int]:
        return self.write(int(self.index["offset"][sample_id]) + 300, bytes(40))

    def zero_stretch(self) -> set[int]:
        return self.write(int(np.sort(self.index["offset"])[10]) + 100, bytes(STRETCH))

    def flip_byte(self, sample_id: int) -> set[int]:
        offset = int(self.index["offset"][sample_id] + self.index["length"][sample_id] // 2)
        (byte,) = self.path.read_bytes()[offset : offset + 1]
        return self.write(offset, bytes([byte ^ 0x55]))

    def truncate(self) -> set[int]:
        end = int(np.sort(self.index["offset"])[-12]) + 50
        os.truncate(self.path, end)
        return self.within(end, 1 << 62)

    def overwrite_end(self) -> set[int]:
        begin = int(np.sort(self.index["offset"])[100]) + 50
        noise = np.random.default_rng(0).integers(0, 256, self.path.stat().st_size - begin, np.uint8)
        return self.write(begin, noise.tobytes())

    def replace_by_rename(self) -> set[int]:
        other = self.path.with_name("other")
        other.write_bytes(bytes(self.path.stat().st_size))
        other.replace(self.path)
        return set()  # what the loader has open is the file that it was built on

    def delete(self) -> set[int]:
        self.path.unlink()
        return set()


def garbage(ids: list[int], images: np.ndarray, whole: Seen) -> list[int]:
    """The ids whose image is not what an undamaged run shows of them."""
    intact = whole.by_id
    pairs = zip(ids, images, strict=True)
    return [sample_id for sample_id, image in pairs if not np.array_equal(image, intact[sample_id])]


def check_training(seen: Seen, whole: Seen, damaged: set[int], epoch: int) -> None:
    """All of the epoch's order, but for the damaged; and each image as that of its id should be."""
    wanted = epoch_order(SEED, epoch, NUM_TRAIN)
    hit = np.isin(wanted, list(damaged))
    assert seen.ids[~hit].tolist() == wanted[~hit].tolist()
    assert not set(seen.ids.tolist()) & damaged
    labels = dict(zip(whole.ids.tolist(), whole.labels.tolist(), strict=True))
    assert seen.labels.tolist() == [labels[sample_id] for sample_id in seen.ids.tolist()]
    assert garbage(seen.ids.tolist(), seen.images, whole) == []


def check_validation(seen: Seen, whole: Seen, damaged: set[int]) -> None:
    kept = ~np.isin(np.arange(NUM_VAL), list(damaged))
    assert seen.ids.tolist() == np.flatnonzero(kept).tolist()
    assert same(seen, Seen(whole.ids[kept], whole.labels[kept], whole.images[kept]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("extent", ["sample", "stretch"])
def test_damage_before_the_start(
    prepared: Prepared, copy_of_prepared: Copy, case: Case, extent: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = read(case, training(*prepared, case))
    shard = Shard.of(copy_of_prepared())
    damaged = shard.zero_in(17) if extent == "sample" else shard.zero_stretch()
    loader = build_loader(case.backend, training(shard.folder, shard.manifest, case))
    seen = consume(loader)
    check_training(seen, whole, damaged, epoch=0)
    assert set(loader.damaged) == damaged
    assert all("CRC-32C differs" in reason for reason in loader.damaged.values())
    said = capfd.readouterr().err
    keys = load_keys(shard.folder, shard.manifest, "train")
    first = next(iter(loader.damaged))
    assert f"rank 0: sample {first} ({keys[first]}) in {shard.path} is damaged: its bytes" in said
    assert said.count("is damaged") == min(len(damaged), 5)  # not a line for each of thousands
    assert same(consume(loader), seen)
    loader.close()
    assert same(read(case, training(shard.folder, shard.manifest, case)), seen)


@each_loader
def test_replacements_are_the_same_on_two_ranks(copy_of_prepared: Copy, case: Case) -> None:
    shard = Shard.of(copy_of_prepared())
    shard.zero_stretch()
    alone = read(case, training(shard.folder, shard.manifest, case)).ids
    halves = [
        read(case, training(shard.folder, shard.manifest, case, rank, 2, batch_size=8)).ids.reshape(-1, 8)
        for rank in range(2)
    ]
    assert np.concatenate(halves, axis=1).flatten().tolist() == alone.tolist()


@each_loader
@pytest.mark.parametrize("damage", [Shard.zero_in, Shard.truncate], ids=["zeros", "truncated"])
def test_validation_leaves_damaged_samples_out(
    prepared: Prepared, copy_of_prepared: Copy, case: Case, damage: Callable[..., set[int]]
) -> None:
    whole = read(case, validation(*prepared, case))
    shard = Shard.of(copy_of_prepared(), "val")
    loader = build_loader(case.backend, validation(shard.folder, shard.manifest, case))
    damaged = damage(shard, 17) if damage is Shard.zero_in else damage(shard)
    for _ in range(2):
        check_validation(consume(loader), whole, damaged)
        assert set(loader.damaged) == damaged and loader.num_left_out == len(damaged)
    loader.close()


@each_loader
def test_validation_batches_of_which_nothing_is_left(
    prepared: Prepared, copy_of_prepared: Copy, case: Case
) -> None:
    whole = read(case, validation(*prepared, case))
    shard = Shard.of(copy_of_prepared(), "val")
    damaged: set[int] = set()
    for gone in (range(10), range(20, 43), range(43)):  # the first batch, the last three, all
        for sample_id in set(gone) - damaged:
            damaged |= shard.zero_in(sample_id)
        check_validation(read(case, validation(shard.folder, shard.manifest, case)), whole, damaged)


@each_loader
@pytest.mark.parametrize(
    "damage",
    [Shard.truncate, Shard.overwrite_end, Shard.replace_by_rename, Shard.delete],
    ids=lambda damage: damage.__name__,
)
def test_damage_between_epochs(
    prepared: Prepared,
    copy_of_prepared: Copy,
    case: Case,
    damage: Callable[[Shard], set[int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    shard = Shard.of(copy_of_prepared())
    whole = [read(case, training(*prepared, case), epoch) for epoch in (0, 1)]
    loader = build_loader(case.backend, training(shard.folder, shard.manifest, case))
    check_training(consume(loader), whole[0], set(), epoch=0)  # all is checked now, once
    damaged = damage(shard)
    check_training(consume(loader, epoch=1), whole[1], damaged, epoch=1)
    loader.close()
    assert set(loader.damaged) == damaged
    assert f"{shard.path} was changed while this job is running" in capfd.readouterr().err


@each_loader
@pytest.mark.parametrize("damage", [Shard.truncate, Shard.overwrite_end], ids=lambda d: d.__name__)
def test_damage_in_the_middle_of_an_epoch(
    prepared: Prepared, copy_of_prepared: Copy, case: Case, damage: Callable[[Shard], set[int]]
) -> None:
    whole = read(case, training(*prepared, case))
    shard = Shard.of(copy_of_prepared())
    loader = build_loader(case.backend, training(shard.folder, shard.manifest, case))
    ids: list[int] = []
    images, damaged = [], set()
    for step, batch in enumerate(loader.epoch(0, resolution=32)):
        ids += batch.sample_ids.tolist()
        images.append(batch.images.numpy())
        if step == 0:
            damaged = damage(shard)
    loader.close()
    assert len(ids) == NUM_TRAIN and garbage(ids, np.concatenate(images), whole) == []
    # The first batches had been read when it happened; the last one had not.
    assert loader.damaged and set(loader.damaged) <= damaged and not set(ids[-16:]) & damaged


@each_loader
def test_a_byte_that_flips_after_its_check(prepared: Prepared, copy_of_prepared: Copy, case: Case) -> None:
    shard = Shard.of(copy_of_prepared())
    whole = read(case, training(*prepared, case), epoch=1)
    loader = build_loader(case.backend, training(shard.folder, shard.manifest, case))
    consume(loader)
    assert not loader.damaged
    damaged = shard.flip_byte(33)
    check_training(consume(loader, epoch=1), whole, damaged, epoch=1)
    loader.close()
    assert damaged == {33} and "CRC-32C differs" in loader.damaged[33]


@each_loader
def test_every_epoch_checks_again(prepared: Prepared, copy_of_prepared: Copy, case: Case) -> None:
    shard = Shard.of(copy_of_prepared())
    whole = read(case, training(*prepared, case), epoch=1)
    always, once = (
        build_loader(case.backend, training(shard.folder, shard.manifest, case, check_bytes=check_bytes))
        for check_bytes in ("every_epoch", "first_epoch")
    )
    for loader in (always, once):
        consume(read_with(loader, ForgetfulReader))
    damaged = shard.flip_byte(33)
    check_training(consume(always, epoch=1), whole, damaged, epoch=1)
    consume(once, epoch=1)
    always.close(), once.close()
    # The other trusts what it has checked: the price of its speed.
    assert set(always.damaged) == damaged and not once.damaged


@each_loader
def test_unchecked_bytes_that_do_not_decode_are_replaced(
    prepared: Prepared, copy_of_prepared: Copy, case: Case
) -> None:
    shard = Shard.of(copy_of_prepared())
    whole = read(case, training(*prepared, case))
    damaged = {3, 4, 90}
    for sample_id in damaged:
        shard.write(int(shard.index["offset"][sample_id]), bytes(100))  # no header any more
    loader = build_loader(case.backend, training(shard.folder, shard.manifest, case, check_bytes="never"))
    read_with(loader, ForgetfulReader)
    for _ in range(2):
        check_training(consume(loader), whole, damaged, epoch=0)
        assert loader.damaged == dict.fromkeys(damaged, "it does not decode")
    loader.close()


@each_loader
def test_unchecked_validation_leaves_out_what_does_not_decode(
    prepared: Prepared, copy_of_prepared: Copy, case: Case
) -> None:
    shard = Shard.of(copy_of_prepared(), "val")
    whole = read(case, validation(*prepared, case))
    damaged = {5, *range(20, 30), 42}  # a whole batch among them
    for sample_id in damaged:
        shard.write(int(shard.index["offset"][sample_id]), bytes(100))
    plan = validation(shard.folder, shard.manifest, case, check_bytes="never")
    loader = read_with(build_loader(case.backend, plan), ForgetfulReader)
    check_validation(consume(loader), whole, damaged)
    loader.close()


@each_loader
def test_a_disk_that_cannot_read(prepared: Prepared, case: Case) -> None:
    whole = read(case, training(*prepared, case))
    loader = read_with(build_loader(case.backend, training(*prepared, case)), UnreadableReader)
    check_training(consume(loader), whole, {8, 9}, epoch=0)
    loader.close()
    assert loader.damaged == dict.fromkeys([8, 9], "the disk cannot read it (Input/output error)")


@each_loader
def test_more_damage_than_can_be_replaced(copy_of_prepared: Copy, case: Case) -> None:
    shard = Shard.of(copy_of_prepared())
    loader = build_loader(case.backend, training(shard.folder, shard.manifest, case))
    consume(loader)
    os.truncate(shard.path, int(shard.index["offset"].min()) + 10)
    for _ in range(2):  # the second epoch is not stuck, either
        with pytest.raises(RuntimeError, match=r"sample \d+ is damaged: .* copy the data set at") as caught:
            consume(loader)
        assert "DALI" not in str(caught.value)
    loader.close()


@each_loader
def test_a_loader_goes_on_after_an_epoch_that_failed(prepared: Prepared, case: Case) -> None:
    expected = read(case, training(*prepared, case), epoch=1)
    loader = build_loader(case.backend, training(*prepared, case))
    with pytest.raises(RuntimeError, match="not to my taste"):
        consume(read_with(loader, PickyReader))
    assert same(consume(read_with(loader, SampleReader), epoch=1), expected)
    loader.close()


@each_loader
def test_a_loader_goes_on_after_it_could_not_replace(
    prepared: Prepared, copy_of_prepared: Copy, case: Case
) -> None:
    expected = read(case, training(*prepared, case), epoch=1)
    shard = Shard.of(copy_of_prepared())
    intact = shard.path.read_bytes()
    shard.write(int(shard.index["offset"][epoch_order(SEED, 0, NUM_TRAIN)[20]]), bytes(100))
    loader = build_loader(case.backend, training(shard.folder, shard.manifest, case, check_bytes="never"))
    read_with(loader, UntracedPickyReader)
    with pytest.raises(RuntimeError, match="it does not decode; so are 32 others"):
        consume(loader)
    shard.write(0, intact)
    assert same(consume(read_with(loader, SampleReader), epoch=1), expected)
    loader.close()
