"""Files that may come from anybody: nothing of them runs, and none grows beyond its size."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.manifest import load_index, load_manifest
from data_prep.sources.tree import open_tree
from evaluation.predict import load_trained
from evaluation.report.command import _read_summary
from train import micro_batch
from train.__main__ import main
from train.checkpoint import CHECKPOINT_VERSION, CheckpointStore, load_checkpoint, read_torch_file
from train.config import Recipe, load_recipe
from train.models.weights import read_weights
from train.run_folder import is_finished, read_status, recipe_differences
from train.sweep import trial
from train.teacher import load_frozen
from train.tracking.metrics_file import read_metrics

torch.set_num_threads(1)


def saved(value: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def state(**values: Any) -> dict[str, Any]:
    return {"version": CHECKPOINT_VERSION, "model": {"weight": torch.arange(64.0)}, **values}


def rewritten(
    content: bytes,
    change: Callable[[str, bytes], bytes] = lambda name, data: data,
    compression: int = zipfile.ZIP_STORED,
    extra: dict[str, bytes] | None = None,
) -> bytes:
    """The same zip as another program writes it, its records changed by `change`."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in (extra or {}).items():
            new.writestr(name, data)
    return buffer.getvalue()


def with_pickle(data: bytes) -> bytes:
    return rewritten(saved(state()), lambda name, old: data if name.endswith("data.pkl") else old)


class Runs:
    """Would make a folder where it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def protocol_2(code: bytes) -> bytes:
    return b"\x80\x02" + code + b"."


def laughs(levels: int) -> bytes:
    """A list of ten times one list of ten times one list …: 10**levels values in a few hundred bytes."""
    code = b"]q\x00"
    for level in range(levels):
        code += b"](" + b"h%c" % level * 10 + b"eq%c" % (level + 1)
    return protocol_2(code)


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1 and len(old) == len(new)
    return content.replace(old, new)


def doubled_end(content: bytes) -> bytes:
    """Two lists of records: one before the end, and another one that the end names."""
    return content[:-22] + content[-22:-6] + struct.pack("<I", 0) + b"\0\0"


def few_but_large() -> bytes:
    """A pickle whose tensor has a million times the values of its storage, all of them the same one."""
    return saved(state(mask=torch.ones(1).expand(1 << 15, 1 << 15)))


SIXTY_FOUR = b"K\x40"  # the number of values of `weight` in a pickle
MILLIONS = b"J\x00\x00\x00\x10"
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed": (
        lambda: rewritten(
            saved(state()),
            lambda name, old: bytes(64 << 20) if name.endswith("data/0") else old,
            zipfile.ZIP_DEFLATED,
        ),
        "compressed",
    ),
    "more values than bytes": (
        lambda: rewritten(
            saved(state()),
            lambda name, old: old.replace(SIXTY_FOUR, MILLIONS) if name.endswith("data.pkl") else old,
        ),
        "more values than the file has",
    ),
    "legacy with more values than bytes": (
        lambda: saved(state(), legacy=True).replace(SIXTY_FOUR, MILLIONS),
        "more values than the file has",
    ),
    "expanded": (few_but_large, "many times larger than the file"),
    "a list of lists of one list": (lambda: with_pickle(laughs(30)), "too many values"),
    "nested": (lambda: with_pickle(protocol_2(b"]" * 100_000 + b"a" * 99_999)), "nested too deeply"),
    "a list in itself": (lambda: with_pickle(protocol_2(b"]q\x00h\x00a")), "nested too deeply"),
    "a key that hashes for ever": (
        lambda: with_pickle(protocol_2(b"})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s")),
        "neither a text nor a number",
    ),
    "an array of terabytes": (
        lambda: with_pickle(protocol_2(b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R")),
        "builtins.bytearray",
    ),
    "a text of gigabytes": (lambda: with_pickle(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40)), ""),
    "two records of one name": (
        lambda: rewritten(saved(state()), extra={"ARCHIVE/data.pkl": b"x"}),
        "one name",
    ),
    "another zip": (
        lambda: rewritten(saved(state()), extra={"elsewhere/data.pkl": b"x"}),
        "not one of torch",
    ),
    "bytes after the end": (lambda: saved(state()) + b"\0" * 30, "not at its end"),
    "bytes before the start": (lambda: saved({}) + saved(state()), "not at its end"),
    "two lists": (lambda: doubled_end(saved(state())), "list"),
    "no torch.save at all": (lambda: b"\0" * 1000, "no file of torch.save"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_checkpoints_that_would_grow_are_refused(tmp_path: Path, name: str) -> None:
    make, reason = BOMBS[name]
    path = tmp_path / "bomb.pt"
    path.write_bytes(make())
    for read in (load_checkpoint, read_weights):
        with pytest.raises(ValueError, match="is truncated") as caught:
            read(path)
        assert reason in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["value", "key of the optimizer", "state of a dictionary"])
def test_pickles_run_nothing(tmp_path: Path, where: str, legacy: bool) -> None:
    hostile = Runs(str(tmp_path / "ran"))
    content = {
        "value": state(progress=hostile),
        "key of the optimizer": state(optimizer={"state": {0: [hostile]}}),
        "state of a dictionary": state(model=OrderedDict(weight=hostile)),
    }[where]
    path = tmp_path / "model.pt"
    path.write_bytes(saved(content, legacy))
    for read in (load_checkpoint, read_weights):
        with pytest.raises(ValueError, match=r"posix\.mkdir"):
            read(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(pickle.UnpicklingError):  # torch itself would not have run it either
        torch.load(path, weights_only=True)
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").is_dir(), "this pickle runs nothing, so it proves nothing"


@pytest.mark.parametrize("legacy", [False, True])
def test_what_a_training_saves_is_read(tmp_path: Path, legacy: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    content = state(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        schedule=schedule.state_dict(),
        random=torch.get_rng_state(),
        values=(1, -2.5, None, True, 10**30, "Wörter", b"\xff\0", torch.Size([2, 3]), torch.bfloat16),
        parameter=torch.nn.Parameter(torch.ones(3)),
        seen=torch.arange(12).view(3, 4).t()[1:],
        wide=torch.ones(1).expand(50),
        empty=torch.zeros(0, 7),
        half=torch.ones(4, dtype=torch.bfloat16),
    )
    (tmp_path / "model.pt").write_bytes(saved(content, legacy))
    loaded = read_torch_file(tmp_path / "model.pt")
    assert loaded["values"] == content["values"] and loaded["schedule"] == content["schedule"]
    for name in ("random", "parameter", "seen", "wide", "empty", "half"):
        assert torch.equal(loaded[name], content[name])
    for one, other in zip(loaded["model"].values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_with_a_hostile_recipe_is_refused(tmp_path: Path) -> None:
    names = ("optimizer", "schedule", "progress")
    whole = {name: {} for name in names} | {"class_names": ["a"], "mean": [0.5] * 3, "std": [0.5] * 3}
    for recipe in (ALIASES, "!!python/object/apply:os.mkdir ['ran']", "[" * 9000, 5, "data: {path: [}"):
        (tmp_path / "model.pt").write_bytes(saved(state(**whole, recipe=recipe)))
        with pytest.raises(ValueError, match=r"the recipe inside .* is of another version"):
            load_trained(tmp_path / "model.pt", torch.device("cpu"))
        with pytest.raises(ValueError, match=r"the recipe inside .* is of another version"):
            load_frozen(tmp_path / "model.pt", ("a",), torch.device("cpu"))


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": 5},
        {"class_names": [1]},
        {"mean": [0.5]},
        {"mean": [float("nan")] * 3},
        {"std": [0, 1, 1]},
        {"model": [torch.zeros(1)]},
        {"model": {"weight": "x"}},
        {"ema": None},
        {"progress": []},
    ],
)
def test_a_checkpoint_of_other_kinds_of_values_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = {name: {} for name in ("optimizer", "schedule", "progress", "recipe")}
    whole |= {"class_names": ["a"], "mean": [0.5] * 3, "std": [0.5] * 3} | changes
    (tmp_path / "model.pt").write_bytes(saved({**state(), **whole}))
    for load in (load_trained, lambda path, device: load_frozen(path, ("a",), device)):
        with pytest.raises(ValueError, match="is not a checkpoint of this project: its"):
            load(tmp_path / "model.pt", torch.device("cpu"))


ALIASES = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 20))
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 60))
HOSTILE_YAML = {
    "aliases of aliases": (ALIASES, "too many values"),
    "merges of merges": (MERGES, "too many values"),
    "an alias of itself": ("data: &a [*a]", "nested too deeply"),
    "brackets": ("[" * 20_000, "nested too deeply"),
    "dashes": ("- " * 10_000, "nested too deeply"),
    "a tag": ("data: !!python/object/apply:os.mkdir [ran]", "no valid YAML"),
    "a name": ("data: !!python/name:os.mkdir ''", "no valid YAML"),
    "a number in base 60": ("data: " + ":".join(["59"] * 40_000), "too long"),
    "digits": ("data: " + "9" * 9_000, "no valid YAML"),
    "a large file": ("#" * (200 << 10), "larger than 128 KiB"),
    "no text": ("data: \0", "no valid YAML"),
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_recipes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, reason = HOSTILE_YAML[name]
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["check", str(tmp_path / "recipe.yaml")]) == 1
    said = capsys.readouterr().err
    assert reason in said and "Traceback" not in said and len(said) < 500 + len(str(tmp_path))
    # In the folder of a run it is what the run was started with.
    assert recipe_differences(tmp_path, a_recipe()) == [f"{tmp_path / 'recipe.yaml'} cannot be read"]
    if len(text) < 50_000:
        (tmp_path / "good.yaml").write_text("data: {path: x}")
        assert main(["check", str(tmp_path / "good.yaml"), f"model={text}"]) == 1
        assert "the value is no valid YAML" in capsys.readouterr().err


def a_recipe() -> Recipe:
    return Recipe.model_validate({"data": {"path": "x"}})


def test_aliases_of_a_usual_size_are_taken(tmp_path: Path) -> None:
    text = "data: {path: x}\nvalidation: {views: {a: &view {flip_average: true}, b: {<<: *view}, c: *view}}"
    (tmp_path / "recipe.yaml").write_text(text)
    assert len(load_recipe(tmp_path / "recipe.yaml").validation.views) == 3


HOSTILE_JSON = {
    "nested": b"[" * 100_000,
    "nested in a row": b'{"step": ' * 100_000,
    "no number": b'{"status": NaN, "grad_accum_steps": Infinity, "step": -Infinity}',
    "a list": b"[1]",
    "no UTF-8": b'{"status": "\xff"}',
    "empty": b"",
    "digits": b'{"step": ' + b"9" * 9000 + b"}",
}


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_files_of_a_run_are_as_good_as_missing(tmp_path: Path, name: str) -> None:
    for file in ("status.json", "summary.json", "micro_batch.json", "metrics.jsonl"):
        (tmp_path / file).write_bytes(HOSTILE_JSON[name])
    assert read_status(tmp_path) == {} and not is_finished(tmp_path)
    assert micro_batch._read(tmp_path / "micro_batch.json", 8) is None
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert trial._summary(tmp_path) == {}
    assert trial.ValidationRows(tmp_path / "metrics.jsonl", "top1").read_new() == []
    assert _read_summary(tmp_path) is None
    (tmp_path / "manifest.json").write_bytes(HOSTILE_JSON[name])
    with pytest.raises(ValueError, match="is damaged"):
        CheckpointStore(tmp_path).manifest()
    with pytest.raises(ValueError, match="is damaged"):
        load_manifest(tmp_path)


def test_rows_of_other_kinds_do_not_stop_a_sweep(tmp_path: Path) -> None:
    rows = ['{"split": "val", "epoch": 1, "top1": 0.5}', '{"split": "val", "epoch": "x", "top1": null}', "[]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*rows, '{"split": "val", "epoch": 2, "top1": 0.6}\n']))
    assert trial.ValidationRows(tmp_path / "metrics.jsonl", "top1").read_new() == [(1, 0.5), (2, 0.6)]


def test_large_files_are_read_only_so_far(tmp_path: Path) -> None:
    with (tmp_path / "status.json").open("wb") as file:
        file.truncate(1 << 40)  # all holes: takes no room on the disk
    assert read_status(tmp_path) == {}


@pytest.mark.parametrize("name", ["../../best.pt", "/etc/passwd", "a/b.pt", ".hidden", "", "step\n.pt"])
def test_names_in_a_list_of_checkpoints_stay_in_its_folder(tmp_path: Path, name: str) -> None:
    entry = {"name": name, "step": 1, "sha256": "0" * 64, "bytes": 1}
    for content in ({"checkpoints": [entry]}, {"checkpoints": [], "best": name}):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is damaged"):
            CheckpointStore(tmp_path).manifest()


@pytest.mark.parametrize(
    ("column", "value"), [("label", 4), ("label", -1), ("shard", 7), ("offset", 1 << 63), ("length", 1 << 31)]
)
def test_an_index_that_leads_out_of_its_data_set_is_refused(
    copy_of_prepared: Callable[[], Path], column: str, value: int
) -> None:
    folder = copy_of_prepared()
    path = folder / "train.index.npy"
    index = np.load(path)
    index[column][3] = value
    np.save(path, index)
    # Whoever changes the index changes its checksum, too.
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["index"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="names classes or places that the data set does not have"):
        load_index(folder, load_manifest(folder), "train")


@pytest.mark.parametrize(("field", "value"), [("mean", float("nan")), ("std", float("inf"))])
def test_statistics_that_are_no_numbers_are_refused(
    copy_of_prepared: Callable[[], Path], field: str, value: float
) -> None:
    folder = copy_of_prepared()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[field][0] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"is damaged or of another version \({field}"):
        load_manifest(folder)


@pytest.mark.parametrize("scheme", ["s3", "https"])
@pytest.mark.parametrize("key", ["data.path", "checkpoint.mirror"])
def test_a_password_in_a_location_is_refused_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, scheme: str
) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {path: x}")
    location = f"{scheme}://somebody:hidden@bucket/imagenet"
    assert main(["check", str(tmp_path / "recipe.yaml"), f"{key}={location}"]) == 1
    said = capsys.readouterr()
    assert key.partition(".")[0] in said.err and "hidden" not in said.err + said.out
    for read in (load_manifest, open_tree):
        with pytest.raises(ValueError, match="bucket") as caught:
            read(location)
        assert "hidden" not in str(caught.value)
