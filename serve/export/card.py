"""The model card: what the model is, how to use it, how good it is, what it cost, where it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.plain_json import read_json
from data_prep.storage import write_atomically
from serve.model_folder import ASSUMED, CARD_NAME, FORM_FILES, Source
from train.config import Recipe
from train.run_folder import METRICS_NAME, SUMMARY_NAME
from train.tracking.metrics_file import read_metrics
from train.validation import views_of

MAX_LISTED_CLASSES = 50


def write_card(
    folder: Path, source: Source, forms: dict[str, dict[str, Any]], timm_fault: str | None
) -> None:
    """Write README.md of an exported folder.

    Args:
        forms: form → what `agreement` found of it, with its file and bytes.
        timm_fault: why timm cannot load it; None where it can.
    """
    summary = _json(source.run_folder, SUMMARY_NAME) or _from_rows(source.run_folder)
    report = _own_report(source)
    has_timm = "safetensors" in source.info.files and timm_fault is None
    sections = [
        _front_matter(has_timm),
        f"# {source.info.title}",
        _what(source, summary),
        _use(folder, source, has_timm, timm_fault),
        _preprocessing(source),
        _recipe(source.recipe, summary),
        _figures(source, summary, report, forms),
        _cost(summary),
        _limits(source, report),
        _provenance(source),
    ]
    write_atomically(folder / CARD_NAME, ("\n\n".join(part for part in sections if part) + "\n").encode())


def _front_matter(has_timm: bool) -> str:
    lines = ["---", "pipeline_tag: image-classification", "tags:", "- image-classification"]
    return "\n".join(lines + (["library_name: timm"] if has_timm else []) + ["---"])


def _what(source: Source, summary: dict[str, Any]) -> str:
    info = source.info
    parameters = summary.get("num_parameters") or sum(p.numel() for p in source.model.parameters())
    names = ", ".join(info.names[:MAX_LISTED_CLASSES])
    more = len(info.names) - MAX_LISTED_CLASSES
    return (
        f"An image classifier with {len(info.names):,} classes: {info.model.get('library')} "
        f"`{info.model.get('name')}`, {parameters / 1e6:.2f} million parameters, input "
        f"{info.preprocessing.resolution} × {info.preprocessing.resolution} pixels, trained on "
        f"`{info.provenance.get('data_set')}`.\n\n"
        f"Classes: {names}{f', and {more:,} more' if more > 0 else ''}."
    )


def _use(folder: Path, source: Source, has_timm: bool, fault: str | None) -> str:
    files = source.info.files
    parts = [
        "## How to use it",
        f"```bash\npython -m serve predict {folder.name} photo.jpg photos/\n```",
    ]
    if has_timm:
        parts.append(
            "```python\nimport timm\n\n"
            f'model = timm.create_model("local-dir:{folder.name}", pretrained=True).eval()\n'
            "config = timm.data.resolve_data_config(model.pretrained_cfg)\n"
            "transform = timm.data.create_transform(**config)\n```\n\n"
            "timm's transform interpolates bilinearly, this model was validated with area interpolation: "
            "some answers differ. `serve/portable/preprocessing.py` is the model's own."
        )
    elif fault and "safetensors" in files:
        parts.append(fault)
    if "onnx" in files or "int8" in files:
        parts.append(
            "```python\nfrom pathlib import Path\n\n"
            "from serve.portable.onnx_classifier import OnnxClassifier\n\n"
            f'classifier = OnnxClassifier(Path("{folder.name}"))  # needs numpy, pillow and onnxruntime\n'
            'print(classifier.classify([Path("photo.jpg").read_bytes()])[0])\n```'
        )
    if set(files) - {"safetensors"}:
        parts.append(
            "The files other than safetensors take `images`, uint8 RGB (n, side, side, 3), any n, and give "
            "`logits`, float32 (n, classes); normalisation is inside."
        )
    if "torchscript" in files or "pt2" in files:
        parts.append("TorchScript and pt2 hold code: load them only from where you trust.")
    return "\n\n".join(parts)


def _preprocessing(source: Source) -> str:
    steps = source.info.preprocessing
    cap = f"shrunk until the {steps.cap_side} side has {steps.resolution_cap} pixels, where it has more; "
    exif = "applied" if steps.apply_exif else "ignored, as in training"
    flip = " Logits are the mean of the image's and its mirror image's." if source.info.flip_average else ""
    return (
        f"## Preprocessing\n\nRGB, on white where transparent; EXIF orientation {exif}; "
        f"{cap if steps.resolution_cap else ''}centred square of {steps.crop_ratio:g} of the shorter side; "
        f"area interpolation to {steps.resolution} × {steps.resolution}; mean {_three(steps.mean)}, std "
        f"{_three(steps.std)} of pixels in [0, 1].{flip} All of it is in `preprocessing.json`."
    )


def _recipe(recipe: Recipe | None, summary: dict[str, Any]) -> str:
    if recipe is None:
        return ""
    changed = recipe.augmentation.model_dump(exclude_defaults=True)
    rows = {
        "epochs": f"{summary.get('epochs', '?')} of {recipe.num_epochs}",
        "weights at the start": _start(recipe, summary),
        "batch": recipe.data.global_batch_size,
        "training resolution": recipe.data.resolution,
        "optimizer": f"{recipe.optimizer.name}, peak rate {recipe.optimizer.peak_lr:g}, weight decay "
        f"{recipe.optimizer.weight_decay:g}",
        "schedule": ", then ".join(f"{p.kind} ({p.epochs:g} epochs)" for p in recipe.schedule.phases),
        "crops": f"{recipe.data.crop_scale[0]:g}–{recipe.data.crop_scale[1]:g} of the area"
        f"{', mirrored' if recipe.data.horizontal_flip else ''}",
        "augmentation": ", ".join(f"{k} {v}" for k, v in changed.items()) or "none besides",
        "loss": f"{recipe.loss.kind}, label smoothing {recipe.loss.label_smoothing:g}",
        "average of weights": f"EMA {recipe.ema.decay:g}" if recipe.ema else "none",
    }
    return "## Recipe\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {_cell(v)} |" for k, v in rows.items())


def _start(recipe: Recipe, summary: dict[str, Any]) -> str:
    """Where the first weights come from, without folders of this machine."""
    note, path = str(summary.get("weights_note") or recipe.weights_at_start), recipe.model.checkpoint
    return note if path is None else note.replace(str(path), path.name)


def _own_report(source: Source) -> dict[str, Any]:
    """The report of this very checkpoint, seen as it is served, on the validation split; else nothing."""
    report = _json(source.run_folder, "report/report.json")
    wanted = {"split": "val", "checkpoint_sha256": source.info.provenance.get("checkpoint_sha256")}
    if source.recipe is not None:
        wanted["view"] = views_of(source.recipe)[0].words
    return report if all(report.get(key) == value for key, value in wanted.items()) else {}


def _figures(
    source: Source, summary: dict[str, Any], report: dict[str, Any], forms: dict[str, dict[str, Any]]
) -> str:
    lines = []
    if summary and not source.is_best:
        lines.append("This is not the run's best checkpoint: what the run states of itself is not its own.")
    elif "final_top1" in summary:
        lines.append(
            f"Validation of the run ({summary.get('validation', '?')}; the training's own precision): top-1 "
            f"{summary['final_top1']:.2%} at the end, {summary['best_top1']:.2%} at best (epoch "
            f"{summary.get('best_epoch')}, chosen on the same images, so it flatters)."
        )
    if isinstance(report.get("top1"), float):
        low, high = report.get("top1_interval") or (float("nan"), float("nan"))
        calibration = (report.get("calibration") or {}).get("before") or {}
        lines.append(
            f"Its report: top-1 {report['top1']:.2%} (95% interval {low:.2%}–{high:.2%}), top-5 "
            f"{report['top5']:.2%}, macro F1 {report.get('macro_f1') or float('nan'):.2%}, ECE "
            f"{calibration.get('ece', float('nan')):.3f}, on {report.get('num_samples'):,} images."
        )
    if forms:
        lines.append(_form_table(forms))
    return "## Figures\n\n" + "\n\n".join(lines) if lines else ""


def _form_table(forms: dict[str, dict[str, Any]]) -> str:
    lines = [
        "Each file against the checkpoint, both computed in fp32 on the same prepared images:",
        "",
        "| file | MB | same answer | same top-5 | largest logit difference | top-1 | checkpoint | images |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for form in FORM_FILES:
        if (row := forms.get(form)) is None:
            continue
        cells = [
            f"`{row['file']}`",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['equal_fraction']:.2%}",
            f"{row['same_top5_fraction']:.2%}",
            f"{row['max_logit_difference']:.2g}",
            _percent(row["top1"]),
            _percent(row["reference_top1"]),
            row["images"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if (row := forms.get("int8")) is not None and row["top1"] is not None:
        lost = row["reference_top1"] - row["top1"]
        lines += ["", f"8 bits cost {100 * lost:.2f} points of top-1 here."]
    return "\n".join(lines)


def _cost(summary: dict[str, Any]) -> str:
    if "wall_seconds" not in summary:
        return ""
    cost = summary.get("cost_usd")
    price = "" if cost is None else f", ${cost:.2f} at the price in the recipe"
    return (
        f"## Cost\n\n{summary['wall_seconds'] / 3600:.2f} hours on {summary.get('world_size', '?')} rank(s), "
        f"{summary.get('images_per_second', '?')} images/s{price}."
    )


def _limits(source: Source, report: dict[str, Any]) -> str:
    lines = [
        '- Every image gets one of the classes above, whatever it shows: there is no answer "none of these".',
        "- Only the centred square is looked at.",
        "- Accuracy holds for images like those of the validation split; others may do worse.",
        "- Probabilities are the softmax, as trained; they are not calibrated unless a report says so.",
    ]
    rows = [
        row for row in report.get("per_class") or [] if isinstance(row, dict) and row.get("top1") is not None
    ]
    if worst := sorted(rows, key=lambda row: row["top1"])[:3]:
        names = ", ".join(f"{row.get('name') or row.get('class')} {row['top1']:.0%}" for row in worst)
        lines.append(f"- Weakest classes (recall): {names}.")
    if source.info.provenance.get("image_settings") == ASSUMED:
        lines.append(
            "- How the training images were capped is assumed: no data set was at hand at the export."
        )
    return "## Limits\n\n" + "\n".join(lines)


def _provenance(source: Source) -> str:
    return "## Where it comes from\n\n```json\n" + json.dumps(source.info.provenance, indent=1) + "\n```"


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None:
        return {}
    try:
        content = read_json(folder / name)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _from_rows(folder: Path | None) -> dict[str, Any]:
    """What metrics.jsonl tells of a run without a summary: not finished, or from its mirror."""
    if folder is None or not (folder / METRICS_NAME).is_file():
        return {}
    rows = [row for row in read_metrics(folder / METRICS_NAME) if isinstance(row.get("top1"), float)]
    if not rows:
        return {}
    best = max(rows, key=lambda row: row["top1"])
    last = rows[-1]
    return {
        "final_top1": last["top1"],
        "best_top1": best["top1"],
        "best_epoch": best.get("epoch"),
        "epochs": last.get("epoch"),
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _three(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
