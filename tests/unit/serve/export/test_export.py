"""`python -m serve export`: every form answers as the checkpoint does, and the folder says what it holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from data_prep.manifest import Manifest
from evaluation.__main__ import main as evaluation_main
from evaluation.stored_images import StoredImages
from serve.__main__ import main
from serve.classifier import OnnxClassifier, TorchClassifier, open_classifier
from serve.demo.torch_model import top1_of
from serve.export.timm_folder import timm_fault
from serve.model_folder import load_source
from serve.portable.model_info import load_info
from tests.unit.serve.trained_run import TIMM, build_run
from train.config import HeadSection, ModelSection

FORMS = ("safetensors", "onnx", "torchscript", "pt2", "int8")


def export(run: Path, out: Path, data: Path, *options: str) -> Path:
    words = ["export", str(run), "--data", str(data), "--out", str(out), "--check-images", "0", *options]
    assert main(words) == 0
    return out


@pytest.fixture(scope="module")
def exported(
    timm_run: Path, prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("exported") / "small"
    return export(timm_run, out, prepared[0], "--format", "all", "--int8")


@pytest.fixture(scope="module")
def own_exported(
    own_run: Path, prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("exported") / "own"
    return export(own_run, out, prepared[0], "--format", "safetensors", "onnx")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_answers_as_the_checkpoint(exported: Path, form: str) -> None:
    found = json.loads((exported / "export.json").read_text())["forms"][form]
    assert found["num_images"] == 43 and "all 43 val images" in found["images"]
    assert found["reference_top1"] > 0.5  # it has learned something: equal answers mean something
    if form == "int8":
        assert found["equal_fraction"] >= 0.9
        assert 0 < found["bytes"] < 0.6 * (exported / "model.onnx").stat().st_size
    else:
        assert found["equal_fraction"] == 1 and found["same_top5_fraction"] == 1
        assert found["max_logit_difference"] < 1e-3
        assert found["top1"] == found["reference_top1"]


def test_flip_averaging_is_part_of_the_model(own_exported: Path, own_run: Path) -> None:
    found = json.loads((own_exported / "export.json").read_text())["forms"]["onnx"]
    assert found["equal_fraction"] == 1 and found["max_logit_difference"] < 1e-3
    classifier = OnnxClassifier(own_exported)
    image = np.random.default_rng(0).integers(0, 256, (1, 48, 48, 3), dtype=np.uint8)
    mirrored = np.ascontiguousarray(image[:, :, ::-1])
    assert np.allclose(classifier.logits(image), classifier.logits(mirrored), atol=1e-4)


def test_timm_loads_the_folder_with_equal_logits(exported: Path, timm_run: Path) -> None:
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    reference = load_source(timm_run)
    images = torch.randn(3, 3, 48, 48)
    with torch.inference_mode():
        # Other memory formats sum in another order.
        assert torch.allclose(model(images), reference.model(images), rtol=0, atol=1e-5)
    weights = reference.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 48, 48)
    assert model.pretrained_cfg["crop_pct"] == 0.875


def test_a_network_that_timm_lacks_is_loaded_by_serve_and_the_card_says_so(
    own_exported: Path, own_run: Path, prepared: tuple[Path, Manifest]
) -> None:
    assert not (own_exported / "config.json").exists()
    assert "timm cannot build it" in (own_exported / "README.md").read_text()
    photo = StoredImages(prepared[0], "val").jpeg(3)
    answers = [
        open_classifier(own_exported, form="safetensors").classify([photo])[0],
        TorchClassifier(own_run).classify([photo])[0],
        open_classifier(own_exported).classify([photo])[0],
    ]
    assert len({answer.names for answer in answers}) == 1
    assert np.ptp([answer.probabilities[0] for answer in answers]) < 1e-4


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (ModelSection(name="resnet18", blurpool=True), "BlurPool"),
        (ModelSection(name="resnet18", activation="leaky_relu"), "leaky_relu"),
        (ModelSection(name="resnet18", head=HeadSection(hidden=(8,))), "head"),
        (ModelSection(library="torchvision", name="resnet18"), "torchvision"),
        (ModelSection(library="own", name="residual_cnn"), "own network"),
    ],
)
def test_what_timm_cannot_build_is_said_in_a_sentence(section: ModelSection, words: str) -> None:
    assert words in (timm_fault(section) or "")
    assert timm_fault(ModelSection(name="resnet18", dropout=0.1)) is None


def test_the_card_tells_of_data_recipe_figures_cost_and_limits(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for heading in ("How to use it", "Preprocessing", "Recipe", "Figures", "Cost", "Limits"):
        assert f"## {heading}" in card
    assert "class_0, class_1, class_2, class_3" in card and "75.00%" in card and "$0.05" in card
    assert "8 bits cost" in card and "adamw, peak rate 0.003" in card


def test_a_batch_of_any_size_gives_the_same_answers(exported: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (7, 48, 48, 3), dtype=np.uint8)
    classifier = OnnxClassifier(exported, num_threads=1)
    alone = np.concatenate([classifier.logits(images[n : n + 1]) for n in range(7)])
    assert np.allclose(classifier.logits(images), alone, atol=1e-4)


def test_a_second_format_joins_the_first_and_another_checkpoint_replaces_it(
    timm_run: Path, own_run: Path, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    export(timm_run, tmp_path, prepared[0], "--format", "safetensors")
    export(timm_run, tmp_path, prepared[0], "--format", "onnx")
    assert set(load_info(tmp_path).files) == {"safetensors", "onnx"}
    export(own_run, tmp_path, prepared[0], "--format", "safetensors")
    assert set(load_info(tmp_path).files) == {"safetensors"}
    assert not (tmp_path / "model.onnx").exists() and not (tmp_path / "config.json").exists()


def test_no_folder_of_this_machine_is_in_an_export(
    timm_run: Path, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    start = Path(shutil.copytree(timm_run, tmp_path / "secret" / "before"))
    run = build_run(tmp_path / "next", prepared[0], {**TIMM, "checkpoint": str(start)}, steps=1)
    summary = json.loads((run / "summary.json").read_text())
    summary["weights_note"] = f"weights of 9 tensors from {start}"  # as a training says it
    (run / "summary.json").write_text(json.dumps(summary))
    out = export(run, tmp_path / "out", prepared[0], "--format", "safetensors")
    assert "weights of 9 tensors from before" in (out / "README.md").read_text()
    assert not [p for p in out.iterdir() if p.suffix in (".md", ".json") and "secret" in p.read_text()]


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.onnx"])
def test_no_file_is_overwritten_that_no_export_has_made(
    timm_run: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("mine")
    assert main(["export", str(timm_run), "--format", "safetensors", "--out", str(tmp_path)]) == 1
    assert f"holds {name}, which no export has made: name another folder" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_does_not_become_an_export(timm_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(timm_run.iterdir())
    assert main(["export", str(timm_run), "--format", "safetensors", "--out", str(timm_run)]) == 1
    assert "is a run: name another folder, such as exported/small" in capsys.readouterr().err
    assert sorted(timm_run.iterdir()) == before


def test_faults_are_one_sentence(
    timm_run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "none"), *out]) == 1
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "preprocessing.json").write_text('{"format_version": 1, "resolution": "large"}')
    with pytest.raises(ValueError, match=r"damaged \(it lacks 'resolution_cap'\)"):
        load_info(tmp_path)
    info = json.loads((exported / "preprocessing.json").read_text())
    hostile = (
        ("files", {"onnx": "../x.onnx"}),
        ("mean", [0, 1]),
        ("std", [0, 1, 1]),
        ("class_names", ["\ud800", "b", "c", "d"]),
    )
    for key, value in hostile:
        (tmp_path / "preprocessing.json").write_text(json.dumps(info | {key: value}))
        with pytest.raises(ValueError, match="damaged"):
            load_info(tmp_path)
    (tmp_path / "preprocessing.json").write_text(json.dumps(info | {"resolution": 64}))
    (tmp_path / "model.onnx").write_bytes((exported / "model.onnx").read_bytes())
    with pytest.raises(ValueError, match="does not fit"):
        OnnxClassifier(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot be read by onnxruntime"):
        OnnxClassifier(tmp_path)


def step_checkpoint(run: Path, **changes: Any) -> Path:
    """Another checkpoint of the run, which is not its best one."""
    state = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    path = run / "checkpoints" / "step-00000009.pt"
    torch.save(state | changes, path)
    return path


def test_a_card_states_no_figures_of_another_checkpoint_or_split(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    run = build_run(tmp_path / "runs" / "small", prepared[0], TIMM, steps=1)
    evaluate = [str(run), "--data", str(prepared[0]), "--no-mlflow"]
    assert evaluation_main([*evaluate, "--split", "train"]) == 0
    assert (run / "report-train" / "report.json").is_file() and not (run / "report").exists()
    card = (export(run, tmp_path / "a", prepared[0], "--format", "safetensors") / "README.md").read_text()
    assert "75.00% at best" in card and "Its report" not in card
    assert evaluation_main(evaluate) == 0
    card = (export(run, tmp_path / "b", prepared[0], "--format", "safetensors") / "README.md").read_text()
    assert "Its report: top-1" in card and "on 43 images" in card
    other = step_checkpoint(run)
    card = (export(other, tmp_path / "c", prepared[0], "--format", "safetensors") / "README.md").read_text()
    assert "not the run's best checkpoint" in card
    assert "75.00%" not in card and "Its report" not in card and "Weakest" not in card
    assert top1_of(run) == "75.00%" and top1_of(other) == ""


def test_only_what_was_made_is_listed_where_an_export_is_exported_again(
    exported: Path, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    out = export(exported, tmp_path / "again", prepared[0], "--format", "safetensors")
    assert set(load_info(out).files) == {"safetensors"}
    assert open_classifier(out).info.class_names


def test_another_model_than_the_checkpoints_is_not_kept(
    timm_run: Path,
    prepared: tuple[Path, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same answers with a tenth of the logits: every probability would be wrong."""
    from serve.commands import export as command

    real = command.load_form
    monkeypatch.setattr(
        command,
        "load_form",
        lambda out, form, file: lambda images: real(out, form, file)(images) * (0.1 if form == "onnx" else 1),
    )
    words = ["export", str(timm_run), "--data", str(prepared[0]), "--out", str(tmp_path)]
    assert main([*words, "--format", "safetensors", "onnx"]) == 1
    assert "not kept" in (said := capsys.readouterr().err) and "onnx: its logits differ" in said
    assert set(load_info(tmp_path).files) == {"safetensors"} and not (tmp_path / "model.onnx").exists()
    assert "onnx" not in json.loads((tmp_path / "export.json").read_text())["forms"]


def test_a_checkpoint_without_numbers_is_refused(
    prepared: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(tmp_path / "runs" / "small", prepared[0], TIMM, steps=1)
    state = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    broken = {
        name: value * float("nan") if value.is_floating_point() else value
        for name, value in state["model"].items()
    }
    path = step_checkpoint(run, model=broken)
    assert main(["export", str(path), "--data", str(prepared[0]), "--out", str(tmp_path / "out")]) == 1
    assert "no numbers for 43 of 43 images" in capsys.readouterr().err
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(StoredImages(prepared[0], "val").jpeg(0))
    assert main(["predict", str(path), str(photo), "--json"]) == 1
    assert "no numbers" in capsys.readouterr().err


def test_a_checkpoint_knows_how_its_images_were_made(
    prepared: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the data set is not: turned photographs would be classified as they lie."""
    run = build_run(tmp_path / "runs" / "small", prepared[0], TIMM, steps=1)
    settings = prepared[1].images.model_dump(mode="json") | {"apply_exif": True, "resolution_cap": 300}
    shown = [f"shown {name}" for name in prepared[1].class_names]
    path = step_checkpoint(run, image_settings=settings, display_names=shown)
    info = load_source(path).info
    assert info.preprocessing.apply_exif and info.preprocessing.resolution_cap == 300
    assert list(info.names) == shown
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(StoredImages(prepared[0], "val").jpeg(0))
    assert main(["predict", str(path), str(photo)]) == 0
    assert "assumed" not in (printed := capsys.readouterr()).err and "shown class_" in printed.out
    assert main(["predict", str(step_checkpoint(run)), str(photo)]) == 0
    assert "the defaults are assumed" in capsys.readouterr().err
