"""Recipes: strict keys, all faults at once, overrides, no code from YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.__main__ import main
from train.config import Recipe, RecipeError, dump_recipe, flatten, load_recipe


def recipe_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "data: {path: x, resolutoin: 64}")
    with pytest.raises(RecipeError, match=r"data\.resolutoin: unknown key; did you mean resolution\?"):
        load_recipe(path)


def test_three_mistakes_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
    data: {path: x, global_batch_size: many}
    optimizer: {peek_lr: 0.1}
    schedule: {phases: [{kind: one_cycle, epochs: 0}]}
    """
    path = recipe_file(tmp_path, text)
    assert main(["check", str(path)]) == 1
    message = capsys.readouterr().err
    assert "3 fault(s)" in message and "Traceback" not in message
    for part in ("data.global_batch_size", "optimizer.peek_lr: unknown key; did you mean peak_lr?"):
        assert part in message
    assert "schedule.phases.0.epochs: should be greater than 0" in message


def test_overrides_reach_sections_and_phases(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "data: {path: x}\nschedule: {phases: [{kind: one_cycle, epochs: 4}]}")
    changes = ["data.path=data/intel", "optimizer.peak_lr=1e-2", "schedule.phases.0.epochs=2", "run.name=a-1"]
    recipe = load_recipe(path, changes)
    assert recipe.data.path == Path("data/intel") and recipe.optimizer.peak_lr == 0.01
    assert recipe.num_epochs == 2 and recipe.run.name == "a-1"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.path", "not of the form"),
        ("optimizer.peak_lr=-1", "greater than 0"),
        ("model.library=keras", "'timm', 'torchvision' or 'own'"),
        ("schedule.phases.7.epochs=1", "no '7'"),
        ("modell.name=x", "modell: unknown key; did you mean model?"),
        ("optimizer.peak_lr=.nan", "finite"),
        ("run.name=../x", "pattern"),
        ("run.name=2024-13-45", "no valid YAML"),
        ("lr_finder.use=true", "needs enabled"),
        ("data.crop_scale=[0.5,0.2]", "crop_scale must be"),
        ("data.resolution=7", "data.resolution: must be a number of pixels from 8 to 2048, or a mapping"),
        ("data.resolution=224px", "must be a number of pixels"),
        ("data.resolution=true", "must be a number of pixels"),
        ("data.resolution=.nan", "must be a number of pixels"),
        ("data.resolution={0: 24, 1: 4000}", "must be a number of pixels"),
        ("data.resolution={0: 24, 1: {0: 32}}", "must be a number of pixels"),
        ("data.resolution={1: 24}", "data.resolution: must name epochs counted from 0, and begin with 0"),
        ("data.resolution={}", "must name epochs counted from 0"),
        ("data.resolution={0: 24, 1.5: 32}", "must name epochs counted from 0"),
        ("data.resolution={0: 24, soon: 32}", "must name epochs counted from 0"),
        ("data.resolution={0: 24, 16: 32}", "epoch 16 never comes, the schedule has 16 epochs"),
        ("data.resolution={0: 24, 0: 32}", "no valid YAML"),
        ("data.path=", "data.path: must be a folder or s3://bucket/prefix"),
        ("data.path=[a]", "must be a folder or s3://bucket/prefix"),
        ("data.loader=webdataset", "'auto', 'ffcv', 'dali' or 'reference'"),
        ("data.check_bytes=sometimes", "'first_epoch', 'every_epoch' or 'never'"),
        ("data.max_damaged_fraction=2", "less than or equal to 1"),
        ("data.timeout_seconds=0", "greater than 0"),
        ("run.preflight=perhaps", "valid boolean"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence.replace(".", r"\.")):
        load_recipe(recipe_file(tmp_path, "data: {path: x}"), [override])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no recipe"),
        ("- a", "is no recipe"),
        ("data: {path: x", "no valid YAML"),
        ("data: {path: x, [a]: 1}", "no valid YAML"),
        ("data: {path: x}\nmodel: {name: a}\nmodel: {name: b}", "'model' stands twice"),
        ("model: {name: resnet18}", "data.path is missing"),
        ("data: !!python/object/apply:os.system ['true']", "no valid YAML"),
        ("data: {path: x}\nschedule: {phases: []}", "at least 1"),
        ("data: {path: x}\nschedule: {phases: [{kind: plateau, epochs: 1.5}]}", "whole"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(recipe_file(tmp_path, text))


def test_missing_file_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"did you mean .*demo\.yaml\?"):
        load_recipe(ROOT / "configs" / "dmeo.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_short(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert len(path.read_text().splitlines()) <= 40
    copy = recipe_file(tmp_path, dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_resolution_grows_with_the_epochs(tmp_path: Path) -> None:
    text = "data: {path: x, resolution: {8: 192, 0: 128, 12: 224.0}}"
    recipe = load_recipe(recipe_file(tmp_path, text))
    sides = [recipe.data.resolution_at(epoch) for epoch in range(recipe.num_epochs)]
    assert sides == [128] * 8 + [192] * 4 + [224] * 4
    assert list(recipe.data.resolutions) == [0, 8, 12] and recipe.validation_resolution == 224
    dumped = dump_recipe(recipe)
    assert load_recipe(recipe_file(tmp_path, dumped)) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    flat = flatten(recipe.model_dump(mode="json"))
    assert {k: v for k, v in flat.items() if "resolution" in k and v} == {
        "data.resolution.0": 128,
        "data.resolution.8": 192,
        "data.resolution.12": 224,
    }
    changed = load_recipe(recipe_file(tmp_path, dumped), ["data.resolution.8=160"])
    assert changed.data.resolution == {0: 128, 8: 160, 12: 224}
    fixed = load_recipe(recipe_file(tmp_path, dumped), ["data.resolution=64", "validation.resolution=96"])
    assert fixed.data.resolutions == {0: 64} and fixed.validation_resolution == 96


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/imagenet", "imagenet"),
        ("data/imagenet/", "imagenet"),
        ("s3://bucket/some/imagenet", "imagenet"),
        ("s3://bucket/some/imagenet/", "imagenet"),
        ("s3://bucket", "bucket"),
    ],
)
def test_data_set_has_a_name_wherever_it_is(tmp_path: Path, path: str, name: str) -> None:
    recipe = load_recipe(recipe_file(tmp_path, f"data: {{path: '{path}'}}"))
    assert recipe.data.name == name
    assert str(recipe.data.path) == (path if path.startswith("s3") else path.rstrip("/"))
    assert load_recipe(recipe_file(tmp_path, dump_recipe(recipe))) == recipe


def test_flatten() -> None:
    tree = {"a": {"b": 1}, "c": [{"d": 2}], "e": [3, 4]}
    assert flatten(tree) == {"a.b": 1, "c.0.d": 2, "e": [3, 4]}
