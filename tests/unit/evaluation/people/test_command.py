"""The command from a checkpoint to a page, on a tiny network and made-up people."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data_prep.manifest import Manifest, load_index, load_keys
from evaluation.__main__ import main
from evaluation.people import command
from evaluation.people.layers import LayerCapture, choose_layers, list_layers, pooled
from tests.integration.launch import TINY_RECIPE
from train.checkpoint.store import CHECKPOINT_VERSION
from train.config import parse_recipe
from train.models.build import build_model

FAST = ["--permutations", "100", "--no-mlflow", "--loader", "reference"]


@pytest.fixture(scope="module")
def run_folder(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint has random weights: good enough to be looked at."""
    folder, manifest = prepared
    text = TINY_RECIPE.replace("DATA", str(folder))
    torch.manual_seed(0)
    model = build_model(parse_recipe(text).model, manifest.num_classes)
    state = {
        "version": CHECKPOINT_VERSION,
        "model": model.state_dict(),
        "recipe": text,
        "class_names": list(manifest.class_names),
        "mean": list(manifest.mean),
        "std": list(manifest.std),
        "progress": {"epoch": 1},
        "optimizer": {},
        "schedule": {},
    }
    run = tmp_path_factory.mktemp("runs") / "<i>tiny"
    (run / "checkpoints").mkdir(parents=True)
    torch.save(state, run / "checkpoints" / "best.pt")
    return run


@pytest.fixture(scope="module")
def human(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Coordinates of the 43 val samples in the order of their keys, and similarities of the 4 classes."""
    folder, manifest = prepared
    keys, index = load_keys(folder, manifest, "val"), load_index(folder, manifest, "val")
    labels = index["label"][np.argsort(keys)]
    generator = np.random.default_rng(0)
    space = generator.normal(size=(4, 3))[labels] + 0.2 * generator.normal(size=(43, 3))
    out = tmp_path_factory.mktemp("human")
    np.savetxt(out / "space.txt", space)
    np.savetxt(out / "alike.txt", 9 - np.abs(np.subtract.outer(np.arange(4), np.arange(4))), fmt="%.2f")
    return out / "space.txt", out / "alike.txt"


@pytest.fixture(scope="module")
def people(run_folder: Path, human: tuple[Path, Path], prepared: tuple[Path, Manifest]) -> Path:
    """The folder that the command left, for two layers and one random network."""
    arguments = ["people", str(run_folder), "--data", str(prepared[0]), "--coordinates", str(human[0]), *FAST]
    arguments += [
        "--similarities",
        str(human[1]),
        "--layer",
        "penultimate",
        "layer1",
        "--num-untrained",
        "1",
    ]
    assert main([*arguments, "--pairs", "1-3"]) == 0
    return run_folder / "people"


def test_the_page_stands_alone_and_shows_names_as_text(people: Path) -> None:
    page = (people / "people.html").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "<i>tiny" not in page and "&lt;i&gt;tiny" in page
    assert page.count("<picture>") == 4  # spaces, dimensions, similarities, layers
    for words in ("random weights", "mean colour", "noise ceiling", "all 43 val images", "all 4 classes"):
        assert words in page
    assert "trained on these very images" not in page  # this is val


def test_json_and_figures_say_the_same(people: Path) -> None:
    figures = json.loads((people / "people.json").read_text(encoding="utf-8"))
    assert [layer["name"] for layer in figures["layers"]] == ["layer1", "penultimate"]
    assert figures["layer"] == "penultimate"
    headline, chosen = figures["headline"], figures["layers"][1]
    assert headline["people_disparity"] == chosen["space"]["disparity"]
    assert headline["people_similarity_spearman"] == chosen["similarity"]["spearman"]
    assert headline["people_ridge_r2"] == chosen["space"]["ridge"]["new_classes"]["mean_r2"]
    assert len(chosen["space"]["correlations"]) == chosen["space"]["num_dimensions"] == 3
    assert chosen["space"]["num_rows"] == 43 and chosen["similarity"]["num_pairs"] == 6
    assert [one["name"] for one in figures["pixels"]] == ["mean colour", "8×8 pixels"]
    assert len(figures["untrained"]) == 1 and figures["untrained"][0][0]["space"]["ridge"] is None
    assert figures["untrained"][0][1]["space"]["disparity"] != chosen["space"]["disparity"]
    assert all(check["fault"] is None for check in figures["order_checks"])
    assert {path.name for path in people.iterdir()} == {
        "people.html", "people.json", "spaces.png", "dimensions.png", "similarities.png", "layers.png"
    }  # fmt: skip


def test_class_level_alone_needs_no_coordinates(
    run_folder: Path, human: tuple[Path, Path], prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    arguments = [
        "people",
        str(run_folder),
        "--data",
        str(prepared[0]),
        "--similarities",
        str(human[1]),
        *FAST,
    ]
    assert main([*arguments, "--num-untrained", "0", "--split", "train", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "people.json").read_text(encoding="utf-8"))
    assert figures["layers"][0]["space"] is None
    assert math.isfinite(figures["headline"]["people_similarity_spearman"])
    page = (tmp_path / "people.html").read_text(encoding="utf-8")
    assert "Both spaces" not in page and "trained on these very images" in page


def test_layers_are_listed(
    run_folder: Path, prepared: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["people", str(run_folder), "--data", str(prepared[0]), "--list-layers"]) == 0
    listing = capsys.readouterr().out
    assert "penultimate" in listing and "layer1 " in listing and "Linear" in listing


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to compare with"),
        (["--layer", "layer1.O"], "no layer 'layer1.O': did you mean 'layer1.0'?"),
        (["--split", "train"], "43 rows; split train has 160 images"),
        (["--pairs", "1-4"], "different dimensions from 1 to 3"),
        (["--pairs", "1,2"], "as 1-2,3-4"),
        (["--permutations", "5"], "from 100 to 100,000"),
    ],
)
def test_mistakes_get_one_sentence(
    arguments: list[str],
    sentence: str,
    run_folder: Path,
    human: tuple[Path, Path],
    prepared: tuple[Path, Manifest],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--coordinates", str(human[0])] if arguments else []
    assert main(["people", str(run_folder), "--data", str(prepared[0]), *given, *arguments]) == 1
    assert sentence in capsys.readouterr().err


class Tokens(nn.Module):
    """A network with maps, tokens, an activation that works in place, and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.act(self.conv(images))
        tokens, _ = self.mix(maps.flatten(2).transpose(1, 2))
        return self.head(tokens.mean(1))


def test_any_layer_can_be_captured_as_it_was_when_it_was_left() -> None:
    model, images = Tokens().eval(), torch.randn(3, 3, 6, 6)
    layers = list_layers(model, images)
    assert [layer.name for layer in layers] == ["conv", "act", "mix", "penultimate", "head"]
    # conv and act share memory: act is what the rest of the network sees.
    names = choose_layers(layers, ["all"])
    assert "conv" not in names and {"act", "mix", "head", "penultimate"} <= set(names)
    with torch.inference_mode(), LayerCapture(model, ["conv", "act", "mix", "penultimate"]) as capture:
        logits = model(images)
        assert torch.allclose(model.head(capture.features["penultimate"]), logits)
    with torch.no_grad():
        before = model.conv(images)
    assert capture.features["conv"] == pytest.approx(before.mean((2, 3)))
    assert (capture.features["conv"] != capture.features["act"]).any()
    assert capture.features["mix"].shape == (3, 4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_pooling_finds_the_pixels_wherever_the_channels_are() -> None:
    maps = torch.randn(2, 7, 4, 4)
    assert pooled(maps, "mean") == pytest.approx(maps.mean((2, 3)))
    assert pooled(maps.permute(0, 2, 3, 1), "mean") == pytest.approx(maps.mean((2, 3)))
    assert pooled(maps, "flatten").shape == (2, 112)


def test_figures_go_to_the_mlflow_run_that_the_summary_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[object, ...]] = []

    def record(*arguments: object) -> None:
        logged.append(arguments)

    monkeypatch.setattr("train.tracking.mlflow_client.add_to_run", record)
    figures = {"people_disparity": 0.5}
    command._log_to_mlflow(tmp_path, "http://named:5000", tmp_path / "people", figures)
    assert logged == []  # no summary: the run has not ended, or is somebody else's
    (tmp_path / "recipe.yaml").write_text(TINY_RECIPE)
    (tmp_path / "summary.json").write_text('{"mlflow_run_id": "abc"}')
    command._log_to_mlflow(tmp_path, "http://named:5000", tmp_path / "people", figures)
    assert logged == [("http://named:5000", "abc", tmp_path / "people", "people", figures)]
