"""The pages of the systems: costs that follow from recipes and prices, and commands that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from data_prep.__main__ import _parser as command_line
from tests.conftest import ROOT
from train.config import Recipe, load_recipe
from train.cost import PRICES_PATH, find_price

SYSTEMS = ROOT / "docs" / "systems"
PAGES = ("a_imagenet", "b_scenes", "c_rocks", "d_intel", "e_intel_cnn")
NUM_TRAIN = 1_281_167  # ImageNet's
SLOW, FAST = 900, 1_500  # images/s at 224 px on a g6.12xlarge: the published system's, and an estimate
PUBLISHED_HOURS = 26.571
MACHINE = "g6.12xlarge"


def epochs_at_224(recipe: Recipe) -> float:
    """Epochs of images of 224 px that have as many pixels; a step of SAM costs two."""
    pixels = sum(recipe.data.resolution_at(epoch) ** 2 for epoch in range(recipe.num_epochs))
    sam = recipe.optimizer.sam
    return pixels / 224**2 * (1 if sam is None else 1 + 1 / sam.every_steps)


def figures(path: Path) -> tuple[str, str, str, str]:
    """Epochs at 224 px, hours, dollars on demand, dollars on the spot market; as the tables write them."""
    recipe = load_recipe(path)
    assert recipe.budget.instance_type == MACHINE
    price = find_price(recipe.budget)
    assert price is not None
    cheap, dear = yaml.safe_load(PRICES_PATH.read_text())["spot_usd_per_hour"][MACHINE]
    if path.stem == "imagenet_resnet50_published":  # which was measured, and ended before its 250 epochs did
        done = PUBLISHED_HOURS * 3600 * SLOW / NUM_TRAIN
        spot = f"{PUBLISHED_HOURS * cheap:.0f}–{PUBLISHED_HOURS * dear:.0f}"
        return f"{done:.0f}", f"{PUBLISHED_HOURS:.1f}", f"{price.usd_per_hour * PUBLISHED_HOURS:.0f}", spot
    epochs = epochs_at_224(recipe)
    low, high = (epochs * NUM_TRAIN / speed / 3600 for speed in (FAST, SLOW))
    on_demand = f"{low * price.usd_per_hour:.0f}–{high * price.usd_per_hour:.0f}"
    return f"{epochs:.1f}", f"{low:.1f}–{high:.1f}", on_demand, f"{low * cheap:.0f}–{high * dear:.0f}"


def table_rows(path: Path, section: str = "") -> dict[str, list[str]]:
    """Recipe → the other cells of its row in a document."""
    text = path.read_text(encoding="utf-8").partition(section)[2] if section else path.read_text()
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


IMAGENET = sorted((ROOT / "configs").glob("imagenet_*.yaml"))


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_hours_and_dollars_follow_from_recipe_and_prices(path: Path) -> None:
    epochs, hours, on_demand, spot = figures(path)
    cells = table_rows(SYSTEMS / "a_imagenet.md")[path.stem]
    assert cells[-4:] == [epochs, hours, on_demand, spot]


def test_the_readme_says_the_same_in_short() -> None:
    rows = table_rows(ROOT / "README.md", "## What ImageNet costs")
    assert 5 <= len(rows) <= 7
    whole = table_rows(SYSTEMS / "a_imagenet.md")
    for name, cells in rows.items():
        assert cells[-3:] == whole[name][-3:], name
        assert cells[0].split("%")[0] == whole[name][0].split("%")[0], name


@pytest.mark.parametrize("name", PAGES)
def test_every_system_has_its_page(name: str) -> None:
    text = (SYSTEMS / f"{name}.md").read_text(encoding="utf-8")
    assert "<!-- results -->" in text and "data_prep prepare" in text and "-m train configs/" in text
    assert f"({name}.md)" in (SYSTEMS / "README.md").read_text(encoding="utf-8")
    for recipe in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / recipe).is_file(), recipe
    commands = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    for words in re.findall(r"-m data_prep (.*?)(?:  #.*)?$", commands, re.MULTILINE):
        assert callable(command_line().parse_args(words.split()).run)
    for recipe, words in re.findall(r"(configs/\w+\.yaml)(.*?)(?:  #.*)?$", commands, re.MULTILINE):
        load_recipe(ROOT / recipe, [word for word in words.split() if "=" in word])
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (SYSTEMS / link).exists(), link
