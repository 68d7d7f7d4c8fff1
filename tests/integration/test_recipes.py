"""Every recipe in configs/ reads, says what to expect, has a price, passes `check` and takes two steps."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from tests.conftest import ROOT, write_image_folder
from train.__main__ import main
from train.check import find_faults
from train.config import load_recipe
from train.cost import find_price
from train.tracking.metrics_file import read_metrics

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
MAX_LINES = 40
GLOBAL_BATCH = 8
NUM_STEPS = 2
SIDES = (32, 64)  # in place of a recipe's only resolution, or of the last of several
SMALL_DATA: dict[str, Any] = {
    "loader": "reference",
    "num_workers": 0,
    "global_batch_size": GLOBAL_BATCH,
    "grad_accum_steps": 1,
}
# Large networks are small here, by options of their libraries; `check` builds them whole, at their own sizes.
ONE_BLOCK_A_STAGE = {"layers": [1, 1, 1, 1]}
SMALLER = {
    **{("timm", f"resnet{depth}"): ONE_BLOCK_A_STAGE for depth in (34, 50, 101, 152)},
    ("timm", "wide_resnet101_2"): ONE_BLOCK_A_STAGE,
    ("torchvision", "inception_v3"): {"aux_logits": False},  # the auxiliary head takes no less than 299 px
}
# Recipes that differ in nothing that is built: the shortest stands for all of them.
FAMILIES = (r"image(nette|woof)_\d+_(5|20)$", r"image(nette|woof)_\d+_80$", r"imagenet_resnet50_\d+$")


def family(path: Path) -> str:
    return next((name for name in FAMILIES if re.match(name, path.stem)), path.stem)


def num_epochs(path: Path) -> int:
    return load_recipe(path).num_epochs


ONE_A_FAMILY = sorted({family(path): path for path in sorted(RECIPES, key=num_epochs, reverse=True)}.values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_complete(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert text.startswith("# ") and f"configs/{path.name}" in text.split("\ndata:")[0]
    recipe = load_recipe(path)
    assert len(recipe.expected) > 40
    price = find_price(recipe.budget)
    assert price is not None and price.cost_usd(3600) == price.usd_per_hour > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_table_of_the_documents_has_the_recipe(path: Path) -> None:
    table = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"`{path.stem}`" in table


def test_resolutions_follow_ffcvs_ramps() -> None:
    # Where a line from 160 to 192 px over these epochs, rounded to multiples of 32, arrives at 192.
    for epochs, (first, last) in {
        16: (11, 13),
        24: (17, 20),
        32: (23, 27),
        40: (29, 34),
        88: (65, 76),
    }.items():
        recipe = load_recipe(ROOT / "configs" / f"imagenet_resnet50_{epochs}.yaml")
        for epoch in range(epochs):
            share = min(1.0, max(0.0, (epoch - first) / (last - first)))
            assert recipe.data.resolution_at(epoch) == round((160 + 32 * share) / 32) * 32
    assert recipe.num_epochs == 88


def test_rates_are_those_of_the_published_batch() -> None:
    recipe = load_recipe(ROOT / "configs" / "imagenet_resnet50_16.yaml")
    assert recipe.optimizer.peak_lr_batch_size is not None
    rate = recipe.optimizer.peak_lr * recipe.data.global_batch_size / recipe.optimizer.peak_lr_batch_size
    assert rate == pytest.approx(0.425)


def test_leaderboard_recipes_keep_its_rules() -> None:
    paths = [path for path in RECIPES if path.stem.startswith(("imagenette", "imagewoof"))]
    assert len(paths) == 12
    for path in paths:
        _, side, epochs = path.stem.split("_")
        recipe = load_recipe(path)
        assert recipe.num_epochs == int(epochs) and not recipe.model.pretrained
        assert recipe.data.resolution == recipe.validation.resolution == int(side)
        assert not recipe.validation.flip_average and not recipe.validation.views


def shrunk_tree(tree: dict[str, Any], data: Path, runs: Path) -> dict[str, Any]:
    """The recipe with its own model, optimizer, loss, augmentation and kinds of phases, small and short."""
    side = tree["data"].get("resolution", 224)
    num_sides = 1 if isinstance(side, int) else len(side)
    tree["data"] |= SMALL_DATA | {"path": str(data), "resolution": SIDES[num_sides - 1]}
    tree["validation"] |= {"batch_size": 16, "resolution": 40, "every_epochs": 1}
    model = tree["model"]
    model["options"] = model.get("options", {}) | SMALLER.get((model["library"], model["name"]), {})
    if model["name"] == "inception_v3":
        tree["data"]["resolution"] = tree["validation"]["resolution"] = 80
    for view in tree["validation"].get("views", {}).values():
        if "resolution" in view:
            view["resolution"] = 32
    phases = tree["schedule"]["phases"]
    has_plateau = any(phase["kind"] == "plateau" for phase in phases)  # which looks at whole epochs
    for phase in phases:
        phase["epochs"] = 1 if has_plateau else 1 / len(phases)
        if "warmup_epochs" in phase:
            phase["warmup_epochs"] = phase["epochs"] / 2
        if "cycle_epochs" in phase:
            phase["cycle_epochs"] = phase["epochs"]
    if "sam" in tree["optimizer"]:
        tree["optimizer"]["sam"]["every_steps"] = NUM_STEPS  # so that one of the two has both passes
    if "ema" in tree:
        tree["ema"]["every_steps"] = 1
    tree.pop("lr_finder", None)  # it has tests of its own
    return tree | {
        "run": {"folder": str(runs), "preflight": False, "log_every_steps": 1},
        "tracking": tree.get("tracking", {}) | {"mlflow": False},
        "precision": {"mode": "fp32"},
    }


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded: `if_available` means random weights here."""
    monkeypatch.setattr("train.models.hub.answers", lambda *arguments: False)


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps' images to train on, of four classes, and eight to validate on."""
    root = tmp_path_factory.mktemp("few")
    num_train = GLOBAL_BATCH * NUM_STEPS // 4
    source = write_image_folder(root / "source", num_classes=4, num_train=num_train, num_val=2)
    prepare(open_source(source), PrepareOptions(out=root / "data", num_workers=1, progress=False))
    return root / "data"


@pytest.mark.parametrize("path", ONE_A_FAMILY, ids=lambda path: path.stem)
@pytest.mark.long
def test_recipe_passes_check_at_its_own_sizes(path: Path, few_images: Path, tmp_path: Path) -> None:
    overrides = [
        f"data.path={few_images}",
        f"data.global_batch_size={GLOBAL_BATCH}",
        f"run.folder={tmp_path}",
    ]
    assert find_faults(load_recipe(path, overrides), path.stem) == []


@pytest.mark.parametrize("path", ONE_A_FAMILY, ids=lambda path: path.stem)
def test_recipe_takes_two_steps_and_validates(path: Path, few_images: Path, tmp_path: Path) -> None:
    tree = shrunk_tree(yaml.safe_load(path.read_text(encoding="utf-8")), few_images, tmp_path / "runs")
    small = tmp_path / path.name
    small.write_text(yaml.safe_dump(tree))
    # In this process, since importing torch and timm takes longer than the two steps.
    assert main([str(small)]) == 0, (tmp_path / "runs" / path.stem / "status.json").read_text()
    rows = read_metrics(tmp_path / "runs" / path.stem / "metrics.jsonl")
    num_epochs = load_recipe(small).num_epochs
    training = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in training] == list(range(1, NUM_STEPS * num_epochs + 1))
    assert len(rows) > len(training) and all(math.isfinite(row["loss"]) for row in rows)
    assert (tmp_path / "runs" / path.stem / "summary.json").is_file()
    shutil.rmtree(tmp_path / "runs")  # some hundred megabytes of checkpoints
