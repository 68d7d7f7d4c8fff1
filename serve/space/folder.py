"""A Space as a folder.

    app.py, requirements.txt, README.md   what the Hub starts, installs and shows
    model/                                model.onnx, preprocessing.json
    serve/                                the page and the preprocessing: serve/page and serve/portable
    examples/                             images to try, if some were given

Example:
    >>> write_space(Path("runs/mine"), Path("space"), title="Scenes")
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import serve
from serve.demo.torch_model import manifest_of, top1_of
from serve.export.forms import write_form, write_traced
from serve.model_folder import FORM_FILES, SAFETENSORS_NAME, Source, is_exported, load_source
from serve.page.onnx_model import MAPS, MappedClassifier
from serve.page.settings import LIMITS
from serve.portable.limits import BadImage
from serve.portable.model_info import ModelInfo, load_info
from serve.served_model import ServedModel
from serve.space.maps import mapped_model
from serve.space.texts import app_text, card_of, readme_text, requirements_text

OURS = ("app.py", "requirements.txt", "README.md", "model", "serve", "examples")
HUBS = (".git", ".gitattributes", ".gitignore", ".cache")
COPIED = ("__init__.py", "page", "portable")
MAX_DIFFERENCE = 1e-3  # of the largest logit


def write_space(
    model: Path,
    out: Path,
    title: str | None = None,
    sentence: str | None = None,
    examples: Sequence[Path] = (),
    licence: str | None = None,
) -> bool:
    """Write the Space of a run, checkpoint or exported folder into `out`; an earlier one is replaced.

    Returns:
        Whether its page can show what the model looked at.

    Raises:
        ValueError: no model there, one that ONNX cannot hold, or an `out` that holds something else.
    """
    _check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        made = Path(name)
        (made / "model").mkdir()
        info, has_maps = _write_model(model, made / "model")
        title = title or f"{str(info.provenance.get('data_set') or 'Image').capitalize()} classifier"
        sentence = sentence or _sentence(info, has_maps)
        (made / "app.py").write_text(app_text(title, sentence), encoding="utf-8")
        (made / "requirements.txt").write_text(requirements_text(), encoding="utf-8")
        card = card_of(model) if is_exported(model) else _figures(model)
        (made / "README.md").write_text(readme_text(info, title, sentence, licence, card), encoding="utf-8")
        _copy_code(made / "serve")
        _copy_examples(examples, made / "examples", info)
        out.mkdir(exist_ok=True)
        for entry in OURS:
            _remove(out / entry)
            if (made / entry).exists():
                (made / entry).rename(out / entry)
    return has_maps


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder")
    foreign = (
        sorted(path.name for path in out.iterdir() if path.name not in OURS + HUBS) if out.exists() else []
    )
    if foreign:
        raise ValueError(f"{out} holds {foreign[0]}, which is no part of a Space: name another folder")


def _write_model(model: Path, folder: Path) -> tuple[ModelInfo, bool]:
    path = folder / FORM_FILES["onnx"]
    if is_exported(model) and not (model / SAFETENSORS_NAME).is_file():
        info = load_info(model)
        shutil.copyfile(info.file(model, "onnx"), path)
        _save_info(info, folder)
        return info, MappedClassifier(folder).has_maps
    source = load_source(model, manifest=None if is_exported(model) else manifest_of(model))
    mapped = mapped_model(source)
    if mapped is not None:
        side = source.info.preprocessing.resolution
        write_traced("onnx", mapped, side, path, ("logits", MAPS))
    else:
        write_form("onnx", source, path)
    _save_info(source.info, folder)
    _check_same(source, folder)
    return source.info, mapped is not None


def _save_info(info: ModelInfo, folder: Path) -> None:
    # The network is not built again there, and its section may name folders of this machine.
    section = {name: value for name, value in info.model.items() if name in ("library", "name")}
    replace(info, model=section, files={"onnx": FORM_FILES["onnx"]}).save(folder)


def _check_same(source: Source, folder: Path) -> None:
    """The network and its ONNX form give the same logits; else RuntimeError."""
    side = source.info.preprocessing.resolution
    images = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), np.uint8)
    served = ServedModel(source.model, source.normalize, source.info.flip_average).eval()
    with torch.no_grad():
        wanted = served(torch.from_numpy(images)).numpy()
    difference = np.abs(MappedClassifier(folder).logits(images) - wanted).max()
    if difference > MAX_DIFFERENCE * np.abs(wanted).max():
        raise RuntimeError(
            f"the ONNX model differs from the checkpoint (by {difference:.2g} in a logit): not written"
        )


def _sentence(info: ModelInfo, has_maps: bool) -> str:
    looked = ", and what it looked at" if has_maps else ""
    classes = f"{len(info.names)} classes"
    return f"Show it a picture, and see which of {classes} it takes it for, how sure it is{looked}."


def _figures(model: Path) -> str:
    top1 = top1_of(model)
    return f"Top-1 on the validation images of its own data set: {top1}, the best epoch's.\n" if top1 else ""


def _copy_code(folder: Path) -> None:
    folder.mkdir()
    package = Path(serve.__file__).parent
    for name in COPIED:
        if (package / name).is_dir():
            shutil.copytree(package / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copyfile(package / name, folder / name)


def _copy_examples(examples: Sequence[Path], folder: Path, info: ModelInfo) -> None:
    for path in examples:
        try:
            info.preprocessing(path.read_bytes(), LIMITS)
        except BadImage as error:
            raise ValueError(f"{path} cannot be an example: {error}") from None
        folder.mkdir(exist_ok=True)
        name, number = path.name, 1
        while (folder / name).exists():
            number += 1
            name = f"{path.stem}_{number}{path.suffix}"
        shutil.copyfile(path, folder / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
