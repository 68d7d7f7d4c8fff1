"""What every loader promises: order, crops, resuming, both formats, odd sizes, and who is chosen."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.manifest import Manifest, load_index
from tests.conftest import ROOT
from tests.unit.train.loader_cases import (
    CASES,
    GLOBAL_BATCH_SIZE,
    NUM_TRAIN,
    NUM_VAL,
    SEED,
    Case,
    Seen,
    consume,
    long_but,
    read,
    same,
    training,
    validation,
)
from train.data import loaders
from train.data.loaders import BACKENDS, build_loader, choose_backend
from train.data.order import epoch_order

Prepared = tuple[Path, Manifest]
REFERENCE = Case("reference")


@pytest.fixture(params=["ffcv", "dali"])
def shards(request: pytest.FixtureRequest) -> Prepared:
    """The same images in each format."""
    return request.getfixturevalue({"ffcv": "prepared", "dali": "prepared_tars"}[request.param])


def skip_unreadable(case: Case, manifest: Manifest) -> None:
    if manifest.format not in BACKENDS[case.backend].formats:
        pytest.skip(f"{case.backend} does not read {manifest.format} shards")


def differences(one: Seen, other: Seen) -> np.ndarray:
    """Mean absolute difference in levels, of each image."""
    return np.abs(one.images.astype(int) - other.images.astype(int)).mean((1, 2, 3))


@pytest.mark.parametrize("resolution", [24, 150])  # smaller than all crops, and larger than all images
@pytest.mark.parametrize("case", CASES)
def test_backends_and_formats_yield_the_same(
    prepared: Prepared, shards: Prepared, case: Case, resolution: int
) -> None:
    skip_unreadable(case, shards[1])
    judge = read(REFERENCE, training(*prepared, REFERENCE), epoch=2, resolution=resolution)
    seen = read(case, training(*shards, case), epoch=2, resolution=resolution)
    assert seen.ids.tolist() == judge.ids.tolist() == epoch_order(SEED, 2, NUM_TRAIN).tolist()
    assert seen.labels.tolist() == judge.labels.tolist()
    assert judge.labels.tolist() == load_index(*prepared, "train")["label"][judge.ids].tolist()
    # Another crop, or a flip, differs by tens of levels: the pictures are stripes. FFCV's
    # fast DCT differs by a few, DALI's triangular filter by more where stripes are reduced.
    mean, worst = {"reference": (0, 0), "ffcv": (3, 6), "dali": (6, 12)}[case.backend]
    apart = differences(seen, judge)
    assert apart.mean() <= mean and apart.max() <= worst
    mirrored = Seen(judge.ids, judge.labels, judge.images[:, :, ::-1])
    nearer_mirrored = differences(seen, mirrored) < apart
    assert not nearer_mirrored.any()


@pytest.mark.parametrize("case", CASES)
def test_validation_is_the_same_in_backends_and_formats(
    prepared: Prepared, shards: Prepared, case: Case
) -> None:
    skip_unreadable(case, shards[1])
    judge = read(REFERENCE, validation(*prepared, REFERENCE, batch_size=7))
    seen = read(case, validation(*shards, case, batch_size=7))
    assert seen.ids.tolist() == judge.ids.tolist() == list(range(NUM_VAL))
    assert seen.labels.tolist() == judge.labels.tolist()
    assert differences(seen, judge).max() <= {"reference": 0, "ffcv": 6, "dali": 12}[case.backend]


@pytest.mark.parametrize("case", CASES)
def test_every_step_can_be_the_first(prepared: Prepared, case: Case) -> None:
    loader = build_loader(case.backend, training(*prepared, case))
    whole = consume(loader, epoch=1)
    for start in range(0, NUM_TRAIN + 1, GLOBAL_BATCH_SIZE):
        rest = consume(loader, epoch=1, start_sample=start)
        assert same(rest, Seen(whole.ids[start:], whole.labels[start:], whole.images[start:])), start
    loader.close()


@pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))
def test_resuming_on_another_world_size_goes_on_in_the_same_order(prepared: Prepared, case: Case) -> None:
    alone = read(case, training(*prepared, case), epoch=3)
    for world_size in (2, 4):
        start = 3 * GLOBAL_BATCH_SIZE
        shares = [
            read(case, training(*prepared, case, rank, world_size, **share(world_size)), 3, start)
            for rank in range(world_size)
        ]
        per_step = GLOBAL_BATCH_SIZE // world_size
        for step in range(7):
            part = slice(step * per_step, (step + 1) * per_step)
            together = np.concatenate([seen.ids[part] for seen in shares])
            here = slice(start + step * GLOBAL_BATCH_SIZE, start + (step + 1) * GLOBAL_BATCH_SIZE)
            assert together.tolist() == alone.ids[here].tolist()
            assert np.array_equal(np.concatenate([seen.images[part] for seen in shares]), alone.images[here])


def share(world_size: int) -> dict[str, Any]:
    return {"batch_size": GLOBAL_BATCH_SIZE // world_size}


@pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))
def test_micro_batches_split_the_same_steps(prepared: Prepared, case: Case) -> None:
    whole = read(case, training(*prepared, case))
    plan = training(*prepared, case, grad_accum_steps=4, batch_size=4)
    loader = build_loader(case.backend, plan)
    assert [len(batch.labels) for batch in loader.epoch(0, resolution=32)] == [4] * 40
    assert same(consume(loader), whole)
    loader.close()


@pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))
def test_batches_that_are_kept_do_not_change(prepared: Prepared, case: Case) -> None:
    loader = build_loader(case.backend, training(*prepared, case))
    kept = [(batch, batch.images.clone()) for batch in loader.epoch(0, resolution=32)]
    consume(loader, epoch=1)
    loader.close()
    assert all(torch.equal(batch.images, copy) for batch, copy in kept)


@pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))
def test_resolution_changes_between_epochs_and_back(prepared: Prepared, case: Case) -> None:
    loader = build_loader(case.backend, training(*prepared, case))
    seen = {}
    for resolution in (32, 48, 32, 17):
        again = consume(loader, epoch=1, resolution=resolution)
        assert same(again, seen.setdefault(resolution, again))
    loader.close()
    assert same(seen[17], read(case, training(*prepared, case), epoch=1, resolution=17))


@pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))
def test_training_and_validation_interleave(prepared: Prepared, case: Case) -> None:
    train_loader = build_loader(case.backend, training(*prepared, case))
    val_loader = build_loader(case.backend, validation(*prepared, case))
    train_ids, val_ids = [], []
    for batch in train_loader.epoch(0, resolution=32):
        train_ids += batch.sample_ids.tolist()
        if len(train_ids) == 5 * GLOBAL_BATCH_SIZE:
            for val_batch in val_loader.epoch(0, resolution=24):
                val_ids += val_batch.sample_ids.tolist()
    train_loader.close()
    val_loader.close()
    assert train_ids == epoch_order(SEED, 0, NUM_TRAIN).tolist() and val_ids == list(range(NUM_VAL))


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_after_one_that_was_left_early_is_whole(prepared: Prepared, case: Case) -> None:
    loader = build_loader(case.backend, training(*prepared, case))
    expected = consume(loader, epoch=1)
    for num_taken in (1, 2, 9):
        batches = loader.epoch(0, resolution=32)
        for _ in range(num_taken):
            next(batches)
        del batches
        assert same(consume(loader, epoch=1), expected)
    loader.close()


@pytest.mark.parametrize("case", CASES)
def test_a_new_epoch_ends_the_one_before(prepared: Prepared, case: Case) -> None:
    loader = build_loader(case.backend, training(*prepared, case))
    expected = consume(loader, epoch=1)
    old = loader.epoch(0, resolution=32)
    next(old)
    new = loader.epoch(1, resolution=32)
    ids = next(new).sample_ids.tolist()
    with pytest.raises(RuntimeError, match="another epoch"):  # rather than ending as if it were whole
        next(old)
    del old
    for batch in new:
        ids += batch.sample_ids.tolist()
    assert ids == expected.ids.tolist()
    loader.close()


@pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))
def test_ranks_without_a_batch_and_a_last_batch_of_one(prepared: Prepared, case: Case) -> None:
    lengths, ids = [], []
    for rank in range(5):  # 43 samples in batches of 14: three batches and one sample
        loader = build_loader(case.backend, validation(*prepared, case, rank, 5, batch_size=14))
        for batch in loader.epoch(0, resolution=32):
            lengths.append(tuple(batch.images.shape))
            ids += batch.sample_ids.tolist()
        assert consume(loader).ids.tolist() == ids[14 * rank : 14 * rank + 14]
        loader.close()
    assert lengths == [(14, 32, 32, 3)] * 3 + [(1, 32, 32, 3)] and ids == list(range(NUM_VAL))
    assert read(case, validation(*prepared, case, batch_size=1000)).ids.tolist() == list(range(NUM_VAL))


@pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))
def test_an_epoch_that_is_over_yields_nothing(prepared: Prepared, case: Case) -> None:
    plan = training(*prepared, case)
    assert len(read(case, plan, start_sample=NUM_TRAIN).ids) == 0
    too_large = training(*prepared, case, global_batch_size=NUM_TRAIN + 1, batch_size=NUM_TRAIN + 1)
    assert len(read(case, too_large).ids) == 0


@pytest.mark.ffcv
def test_more_workers_than_cores(prepared: Prepared) -> None:
    case = Case("ffcv", num_workers=1000)
    assert same(read(case, training(*prepared, case)), read(Case("ffcv"), training(*prepared, Case("ffcv"))))


@pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))
def test_a_global_batch_that_cannot_be_shared_is_refused(prepared: Prepared, case: Case) -> None:
    loader = build_loader(case.backend, training(*prepared, case, world_size=3))
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        consume(loader)
    loader.close()


@pytest.mark.parametrize(
    ("shard_format", "missing", "chosen", "reasons"),
    [
        ("ffcv", (), "ffcv", ["first choice"]),
        ("ffcv", ("ffcv",), "dali", ["first choice", "no ffcv"]),
        ("ffcv", ("ffcv", "dali"), "reference", ["first choice", "no ffcv", "no dali"]),
        ("dali", (), "dali", ["first choice", "ffcv does not read dali shards"]),
        ("dali", ("dali",), "reference", ["ffcv does not read dali shards", "no dali"]),
    ],
)
def test_auto_takes_the_first_choice_and_says_what_it_passed_over(
    monkeypatch: pytest.MonkeyPatch,
    shard_format: str,
    missing: tuple[str, ...],
    chosen: str,
    reasons: list[str],
) -> None:
    for name in ("ffcv", "dali"):
        fault = f"no {name}" if name in missing else None
        monkeypatch.setattr(loaders, f"_{name}_fault", lambda fault=fault: fault)
    backend, reason = choose_backend("auto", shard_format)
    assert backend == chosen and all(words in reason for words in reasons)


def test_a_backend_that_does_not_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libopencv_core.so.4: cannot open shared object file")

    monkeypatch.setattr(loaders.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    name, reason = choose_backend("auto", "ffcv")
    assert name == "reference" and "libopencv_core.so.4" in reason
    with pytest.raises(ValueError, match=r"data\.loader: dali cannot be used: .*set data\.loader=auto"):
        choose_backend("dali", "ffcv")


@pytest.mark.ffcv
def test_loading_leaves_torchs_threads_to_the_training(prepared: Prepared) -> None:
    """In a process of its own: importing FFCV sets them to 1, which happens once."""
    program = (
        "import torch, sys, pathlib\n"
        "torch.set_num_threads(3)\n"
        "from tests.unit.train.loader_cases import Case, consume, training\n"
        "from data_prep.manifest import load_manifest\n"
        "from train.data.loaders import build_loader, choose_backend\n"
        "assert choose_backend('auto', 'ffcv')[0] == 'ffcv' and torch.get_num_threads() == 3, 'chosen'\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "loader = build_loader('ffcv', training(folder, load_manifest(folder), Case('ffcv')))\n"
        "assert torch.get_num_threads() == 3, 'built'\n"
        "consume(loader)\n"
        "assert torch.get_num_threads() == 3, 'used'\n"
        "from ffcv.pipeline.compiler import Compiler\n"
        "from numba.typed import Dict\n"
        "assert Dict is not dict and Compiler.is_enabled, 'what was left out for a quick start is back'\n"
        "loader.close()\n"
    )
    words = [sys.executable, "-c", program, str(prepared[0])]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
