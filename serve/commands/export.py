"""`python -m serve export`: a checkpoint in the forms that others can use, each compared with it.

python -m serve export runs/mine --format safetensors onnx --int8 --data data/intel --out exported/mine
python -m serve export s3://bucket/runs/mine --format all --out exported/mine
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from data_prep.manifest import Manifest, load_manifest
from data_prep.plain_json import read_json
from data_prep.storage import is_s3, sha256_file, write_atomically
from serve.classifier import TorchClassifier
from serve.export.agreement import (
    Agreement,
    CheckImages,
    chosen_samples,
    compare,
    logits_of,
    prepared,
)
from serve.export.card import write_card
from serve.export.forms import write_form
from serve.export.int8 import NUM_IMAGES, write_int8
from serve.export.loaded import load_form
from serve.export.timm_folder import timm_fault
from serve.model_folder import (
    CARD_NAME,
    EXPORT_NAME,
    FORM_FILES,
    TIMM_CONFIG_NAME,
    Source,
    is_exported,
    load_source,
    model_section,
    with_data_set,
)
from train.config import Recipe
from train.data.staging import stage

FORMATS = ("safetensors", "onnx", "torchscript", "pt2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="a run folder (its best checkpoint), a checkpoint file, or s3://…/runs/NAME"
    )
    parser.add_argument("--format", nargs="+", choices=[*FORMATS, "all"], default=["safetensors", "onnx"])
    parser.add_argument(
        "--int8", action="store_true", help="ONNX in 8 bits, too, calibrated on training images"
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--data", help="the prepared data set it was trained on: a folder or s3://…")
    parser.add_argument(
        "--check-images", type=int, default=2000, metavar="N", help="validation images to compare on; 0: all"
    )


def run(options: argparse.Namespace) -> int:
    """Export, compare, write the card; exit code 1 where a float form gives other answers."""
    if options.check_images < 0:
        raise ValueError(f"--check-images is {options.check_images}: it must be 0 (all) or more")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.source)
        if is_s3(options.source):
            from serve.download.from_s3 import bring

            # Called as the run is: its card names it so.
            path = bring(options.source, Path(folder) / options.source.rstrip("/").rpartition("/")[2])
        return _export(path, options)


def _export(path: Path, options: argparse.Namespace) -> int:
    _check_out(options.out)
    source = load_source(path)
    data = _data_folder(options.data, source.recipe, source)
    if data is not None and source.recipe is not None:  # an exported folder knows it already
        source = replace(source, info=with_data_set(source.info, load_manifest(data)))
    if options.int8 and data is None:
        raise ValueError("--int8 is calibrated on training images: name the prepared data set with --data")
    # Files that an exported folder names are not in another one; of the same one `_known` finds them again.
    source = replace(source, info=replace(source.info, files={}))
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    known = _known(out, source)
    source.info.save(out)  # from here on the folder is an export, also where this one is cut short
    classifier = TorchClassifier(source)
    check = _check_images(classifier, data, options.check_images)
    reference = logits_of(classifier.logits, check.images, "checkpoint")
    forms = [form for form in FORMATS if form in options.format or "all" in options.format]
    if options.int8:
        forms = [form for form in forms if form != "onnx"] + ["onnx", "int8"]
    faults = []
    for form in forms:
        if form == "int8" and "onnx" not in source.info.files:
            faults.append("int8: it is made from the ONNX form")
            continue
        file = out / FORM_FILES[form]
        partial = out / f".partial-{FORM_FILES[form]}"
        try:
            if form == "int8":
                assert data is not None
                ids, stored = chosen_samples(data, "train", NUM_IMAGES)
                write_int8(out / FORM_FILES["onnx"], partial, prepared(stored, ids, classifier))
            else:
                write_form(form, source, partial)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        source = replace(source, info=replace(source.info, files={**source.info.files, form: file.name}))
        source.info.save(out)
        agreement = compare(reference, load_form(out, form, file), check, form)
        if form != "int8" and (fault := agreement.float_fault()):
            # Nothing that reads this folder may find it.
            file.unlink()
            files = {name: path for name, path in source.info.files.items() if name != form}
            source = replace(source, info=replace(source.info, files=files))
            source.info.save(out)
            known.pop(form, None)
            faults.append(f"{form}: {fault}")
            continue
        known[form] = {
            "file": file.name,
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
            **agreement.as_dict(),
        }
        print(_line(form, file, agreement))
    write_atomically(out / EXPORT_NAME, (json.dumps({"forms": known}, indent=1) + "\n").encode())
    fault = timm_fault(model_section(source.info, out))
    write_card(out, source, known, fault)
    if fault and "safetensors" in forms:
        print(f"note: {fault}")
    print(f"{out}: {', '.join(sorted(source.info.files.values()))}, preprocessing.json, README.md (its card)")
    if faults:
        raise RuntimeError(f"not kept, since they are not the checkpoint's model: {'; '.join(faults)}")
    return 0


def _check_out(out: Path) -> None:
    """ValueError where something would be overwritten that no export has made."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder")
    if (out / "checkpoints").is_dir():
        raise ValueError(f"{out} is a run: name another folder, such as exported/{out.resolve().name}")
    names = (CARD_NAME, EXPORT_NAME, TIMM_CONFIG_NAME, *FORM_FILES.values())
    foreign = next((name for name in names if (out / name).exists()), None)
    if foreign is not None and not is_exported(out):
        raise ValueError(f"{out} holds {foreign}, which no export has made: name another folder")


def _known(out: Path, source: Source) -> dict[str, dict[str, object]]:
    """What an earlier export of the very same checkpoint to this folder has found; else nothing."""
    try:
        from serve.portable.model_info import load_info

        before = load_info(out)
        forms = read_json(out / EXPORT_NAME)["forms"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if before.provenance.get("checkpoint_sha256") != source.info.provenance["checkpoint_sha256"]:
        for name in (*FORM_FILES.values(), TIMM_CONFIG_NAME):
            (out / name).unlink(missing_ok=True)  # of another checkpoint
        return {}
    kept = {form: file for form, file in before.files.items() if form in forms and (out / file).is_file()}
    source.info.files.update(kept)
    return {form: forms[form] for form in kept}


def _data_folder(named: str | None, recipe: Recipe | None, source: Source) -> Path | None:
    """The data set that was named, or else the recipe's, where it is on this machine and still the same."""
    if named is not None and is_s3(named):
        return stage(named, (recipe.data.stage_folder if recipe else Path("data/staged"))).folder
    if named is not None:
        return Path(named)
    if recipe is None or is_s3(str(recipe.data.path)):
        return None
    try:
        manifest: Manifest = load_manifest(Path(recipe.data.path))
    except (ValueError, OSError):
        return None
    is_same = manifest.class_names == source.info.class_names
    return Path(recipe.data.path) if is_same and "val" in manifest.splits else None


def _check_images(classifier: TorchClassifier, data: Path | None, most: int) -> CheckImages:
    if data is None:
        print(
            "note: no data set is at hand, so the forms are compared on drawn patterns, not on photographs: "
            "--data FOLDER compares them on its validation images",
            file=sys.stderr,
        )
        return CheckImages.drawn(classifier.info.preprocessing.resolution)
    return CheckImages.of_split(data, "val", classifier, most or None)


def _line(form: str, file: Path, found: Agreement) -> str:
    accuracy = ""
    if found.top1 is not None and found.reference_top1 is not None:
        accuracy = f", top-1 {found.top1:.2%} (checkpoint {found.reference_top1:.2%})"
    return (
        f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, {found.equal_fraction:.2%} same answers and "
        f"{found.same_top5_fraction:.2%} same top-5 on {found.images}, largest difference of a logit "
        f"{found.max_logit_difference:.2g}{accuracy}"
    )
