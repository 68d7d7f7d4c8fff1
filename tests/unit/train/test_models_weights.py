"""Weights from files: what is loaded, what stays random, and what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from train.checkpoint import CHECKPOINT_VERSION, CheckpointStore
from train.config import ModelSection
from train.models.build import build_model
from train.models.weights import load_weights

torch.set_num_threads(1)


def build(num_classes: int = 7, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    changes = {"library": "own", "name": "residual_cnn", "options": {"widths": [8, 8, 8, 8]}, **changes}
    return build_model(ModelSection.model_validate(changes), num_classes)


def equal(model: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def project_state(model: nn.Module, **changes: Any) -> dict[str, Any]:
    names = ("optimizer", "schedule", "progress", "recipe", "mean", "std")
    state: dict[str, Any] = {
        "version": CHECKPOINT_VERSION,
        "model": model.state_dict(),
        **{name: {} for name in names},
    }
    return {**state, "class_names": ["a"] * 7, **changes}


WRAPPINGS = {
    "plain": lambda weights: weights,
    "state_dict": lambda weights: {"epoch": 3, "state_dict": weights},
    "model": lambda weights: {"model": weights, "optimizer": {}},
    "model_ema": lambda weights: {"model": {k: v + 1 for k, v in weights.items()}, "model_ema": weights},
    "ddp": lambda weights: {"model": {f"module.{k}": v for k, v in weights.items()}},
    "compiled ddp": lambda weights: {f"_orig_mod.module.{k}": v for k, v in weights.items()},
    "averaged": lambda weights: {
        "n_averaged": torch.tensor(3),
        **{f"module.{k}": v for k, v in weights.items()},
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_state_dicts_load(tmp_path: Path, wrapping: str) -> None:
    weights = build(seed=1).state_dict()
    torch.save(WRAPPINGS[wrapping](weights), tmp_path / "weights.pth")
    model = build(checkpoint=tmp_path / "weights.pth", gradient_checkpointing=True)
    assert equal(model, weights) and not equal(build(), weights)
    assert model.weights_note == f"weights of {len(weights)} tensors from {tmp_path / 'weights.pth'}"


def test_safetensors_load(tmp_path: Path) -> None:
    weights = build(seed=1, channels_last=False).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    assert equal(build(checkpoint=tmp_path / "weights.safetensors"), weights)


def test_run_folder_gives_the_weights_of_its_headline(tmp_path: Path) -> None:
    plain, average = build(seed=1), build(seed=2)
    store = CheckpointStore(tmp_path / "checkpoints")
    store.folder.mkdir()
    store.save(project_state(plain), step=1, is_best=True, keep_last=1)
    assert equal(build(checkpoint=tmp_path), plain.state_dict())
    changes = {"ema": average.state_dict(), "headline_weights": "ema"}
    store.save(project_state(plain, **changes), step=2, is_best=True, keep_last=1)
    assert equal(build(checkpoint=tmp_path), average.state_dict())
    assert equal(build(checkpoint=tmp_path / "checkpoints" / "step-00000002.pt"), average.state_dict())
    store.save(
        project_state(plain, **{**changes, "headline_weights": "model"}), step=3, is_best=True, keep_last=1
    )
    assert equal(build(checkpoint=tmp_path), plain.state_dict())


@pytest.mark.parametrize(
    ("classes", "head", "sentence"),
    [
        (4, None, "head (2 tensors) starts at random: 7 classes there, 4 here"),
        (7, {"hidden": [6]}, "head (4 tensors) starts at random: another head there"),
    ],
)
def test_another_head_stays_random(tmp_path: Path, classes: int, head: Any, sentence: str) -> None:
    weights = build(seed=1).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    untrained = build(classes, head=head).state_dict()
    model = build(classes, head=head, checkpoint=tmp_path / "weights.pt")
    assert sentence in model.weights_note
    for key, value in model.state_dict().items():
        assert torch.equal(value, untrained[key] if key.startswith("head.") else weights[key]), key


def test_another_activation_and_head_take_the_rest_and_say_so(tmp_path: Path) -> None:
    trained = build(seed=1, head={"hidden": [6]})
    store = CheckpointStore(tmp_path / "checkpoints")
    store.folder.mkdir()
    store.save(project_state(trained), step=1, is_best=True, keep_last=1)
    model = build(activation="leaky_relu", head={"hidden": [5]}, checkpoint=tmp_path)
    weights = trained.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items() if not k.startswith("head."))
    assert isinstance(model.blocks[0].act1, nn.LeakyReLU)
    for words in ("another head there", "every activation is leaky_relu here"):
        assert words in model.weights_note


def test_auxiliary_heads_may_be_missing_on_either_side(tmp_path: Path) -> None:
    def googlenet(**options: Any) -> Any:
        changes = {
            "library": "torchvision",
            "name": "googlenet",
            "options": {"init_weights": False, **options},
        }
        return build_model(ModelSection.model_validate(changes), 7)

    full = googlenet()
    torch.save(full.state_dict(), tmp_path / "full.pt")
    bare = googlenet(aux_logits=False)
    assert "starts at random" not in load_weights(bare, tmp_path / "full.pt")
    assert equal(bare, full.state_dict())
    torch.save(bare.state_dict(), tmp_path / "bare.pt")
    note = load_weights(googlenet(), tmp_path / "bare.pt")
    assert "head (20 tensors) starts at random" in note


def test_another_model_is_refused_by_a_few_names_and_leaves_the_model_alone(tmp_path: Path) -> None:
    weights = build(seed=1).state_dict()
    changed = {**weights, "stem.0.weight": torch.zeros(9, 3, 3, 3)}
    changed |= {f"extra.{index}.{'x' * 500}": torch.zeros(1) for index in range(1000)}
    del changed["blocks.1.bn1.weight"]
    torch.save(changed, tmp_path / "weights.pt")
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="of another model than ResidualCnn") as caught:
        load_weights(model, tmp_path / "weights.pt")
    text = str(caught.value)
    assert "1 missing, e.g. blocks.1.bn1.weight" in text and "1000 unexpected, e.g. extra.0." in text
    assert (
        "stem.0.weight (9×3×3×3 there, 8×3×3×3 here)" in text and len(text) < 1000 and "extra.3" not in text
    )
    assert equal(model, before)


class Hostile:
    """Would make a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path) -> None:
    torch.save({"model": Hostile(tmp_path / "ran")}, tmp_path / "zip.pt")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    for name in ("zip.pt", "old.pth"):
        with pytest.raises(ValueError, match="more than plain weights") as caught:
            load_weights(build(), tmp_path / name)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 100, 5000])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"weights{suffix}"
    weights = build(channels_last=False).state_dict()
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is truncated"):
        load_weights(build(), path)


@pytest.mark.parametrize("content", [{"model": 3}, [1, 2], {"a": {"b": torch.zeros(1)}}, {}, torch.zeros(2)])
def test_files_without_weights_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        load_weights(build(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not exist"):
        load_weights(build(), tmp_path / "none.pt")
