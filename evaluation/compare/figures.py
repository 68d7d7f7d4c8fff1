"""The figures of a run, one dictionary a run, of which the table, the page and the files are made.

Keys are those of `columns.COLUMNS`; a figure that is not known is not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evaluation.compare.curves import Curve, curve
from evaluation.compare.model_cost import NOTHING_MEASURED, MeasuredCost, StaticCost
from evaluation.compare.runs import RunRecord
from evaluation.compare.stability import Stability, stability
from evaluation.metrics import Predictions, finite_number, topk_accuracy, wilson_interval

NEAR_BEST = 0.01  # of top-1: "within 1 point of the best"
COUNT_TOLERANCE = 2e-3  # of an image: summary.json holds all digits, rows of metrics.jsonl six
MAX_HARDWARE_LENGTH = 120

Figures = dict[str, Any]


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """A run with all that is known of it.

    Attributes:
        letter: A, B, … in the order of the command line: how figures and page name it in short.
        predictions: on the images that all runs are compared on, in order; None where it has none.
        num_images: of the validation split that the run's own figures are of, where that is known.
        data_sha256: of that split's sample index. predictions_sha256: of the one that the predictions are of.
    """

    letter: str
    record: RunRecord
    static: StaticCost | None = None
    measured: MeasuredCost = NOTHING_MEASURED
    predictions: Predictions | None = None
    num_classes: int | None = None
    num_images: int | None = None
    data_sha256: str | None = None
    predictions_sha256: str = ""
    notes: tuple[str, ...] = ()
    figures: Figures = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def label(self) -> str:
        return f"{self.letter} · {self.name}"

    @property
    def score(self) -> float | None:
        """Top-1 on the common images, else the best of its own validations."""
        return self.figures.get("top1", self.figures.get("best_top1"))


def with_figures(run: ComparedRun) -> ComparedRun:
    """The same run, its figures made anew from the rest of it."""
    return replace(run, figures=run_figures(run))


def run_figures(run: ComparedRun) -> Figures:
    """All figures of a run that can be told, under the keys of the table."""
    judged = run_stability(run)
    figures = {
        **_common_figures(run.predictions),
        **_own_accuracy(run),
        **_size_figures(run),
        **_speed_figures(run),
        "stability": judged.word,
        "stability_reason": judged.reason or None,
        "loss_spikes": judged.num_spikes,
        "loss_spikes_of_run": _largest(run.record, "loss_spikes"),
        "skipped_steps": _skipped_steps(run.record),
        "top1_deviation": judged.top1_deviation,
        "top1_trend_deviation": judged.top1_trend_deviation,
        "val_loss_deviation": judged.loss_deviation,
        "largest_drop": judged.largest_drop,
        "largest_drop_epoch": judged.largest_drop_epoch,
    }
    return {key: value for key, value in figures.items() if value is not None}


def run_stability(run: ComparedRun) -> Stability:
    rows = run.record.rows
    return stability(
        curve(rows, "train", "loss").values,
        curve(rows, "val", "top1"),
        curve(rows, "val", "loss"),
        num_images=run.num_images,
        run_spikes=_largest(run.record, "loss_spikes"),
        skipped_steps=_skipped_steps(run.record),
    )


def _common_figures(predictions: Predictions | None) -> Figures:
    if predictions is None:
        return {}
    figures: Figures = {"num_images": predictions.num_samples}
    for k in (1, 5):
        if k < predictions.num_classes:
            top = topk_accuracy(predictions, k)
            figures[f"top{k}"] = top
            figures |= fraction_interval(f"top{k}", top, predictions.num_samples)
    return figures


def _own_accuracy(run: ComparedRun) -> Figures:
    """Best and final top-1 and top-5 by the run's own validations, and when the best came."""
    record = run.record
    top1, top5 = (curve(record.rows, "val", field) for field in ("top1", "top5"))
    figures: Figures = {}
    if len(top1):
        at = int(top1.values.argmax())
        figures |= {"best_top1": float(top1.values[at]), "final_top1": float(top1.values[-1])}
        figures |= {"best_epoch": float(top1.epochs[at]), "epochs": float(top1.epochs[-1])}
        figures |= {
            "best_top5": _value_at(top5, top1.epochs[at]),
            "final_top5": _value_at(top5, top1.epochs[-1]),
        }
    for name in ("best_top1", "best_top5", "final_top1", "final_top5", "best_epoch", "epochs"):
        if (value := record.number(name)) is not None and not (
            name.endswith(("1", "5")) and not 0 <= value <= 1
        ):
            figures[name] = value
    if len(top1) and (best := figures.get("best_top1")) is not None:
        near = top1.epochs[top1.values >= best - NEAR_BEST]
        figures["epochs_to_near_best"] = float(near[0]) if len(near) else None
    if run.num_classes is not None and run.num_classes <= 5:
        # Among five classes every answer is one of the first five.
        figures["best_top5"] = figures["final_top5"] = None
    for name in ("best_top1", "final_top1", "best_top5", "final_top5"):
        if figures.get(name) is not None:
            figures |= fraction_interval(name, figures[name], run.num_images)
    figures["num_own_images"] = run.num_images
    return figures


def _value_at(other: Curve, epoch: float) -> float | None:
    found = other.values[other.epochs == epoch]
    return float(found[0]) if len(found) else None


def fraction_interval(name: str, fraction: float, num_images: int | None) -> Figures:
    """The 95% Wilson interval, where `num_images` can be what the fraction is of."""
    if not num_images:
        return {}
    count = fraction * num_images
    if abs(count - round(count)) > max(COUNT_TOLERANCE, 1e-6 * num_images):
        return {}  # the data set has changed since: no whole number of its images makes this fraction
    low, high = wilson_interval(round(count), num_images)
    return {f"{name}_low": low, f"{name}_high": high}


def _size_figures(run: ComparedRun) -> Figures:
    record, static, measured = run.record, run.static, run.measured
    figures: Figures = {"num_parameters": record.number("num_parameters")}
    if static is not None:
        figures |= {
            "num_parameters": static.num_parameters,
            "forward_flops": static.forward_flops,
            "forward_macs": static.forward_macs,
            "resolution": static.resolution,
            "file_bytes": static.weights_bytes,
        }
    figures.setdefault("resolution", record.number("validation_resolution"))
    if record.weights_bytes:
        figures["file_bytes"] = record.weights_bytes
    recorded = record.number("memory_bytes") or _largest(record, "memory_bytes")
    if recorded:
        figures |= {"training_memory_bytes": recorded, "training_memory_of": memory_of(record.hardware)}
    figures |= {
        "step_memory_bytes": measured.training_memory_bytes,
        "step_micro_batch_size": measured.micro_batch_size,
        **{f"inference_memory_bytes_{size}": peak for size, peak in measured.inference_memory_bytes.items()},
    }
    return figures


def memory_of(hardware: str | None) -> str:
    """What a run's own figure of memory is of: trainings on GPUs name them as `4 × NVIDIA L4`."""
    if hardware is None:
        return "the GPU, or the whole process on a CPU"
    return "the GPU" if " × " in hardware else "the whole process"


def _speed_figures(run: ComparedRun) -> Figures:
    record, seconds = run.record, run.measured.inference_seconds
    figures: Figures = {
        name: record.number(name) for name in ("images_per_second", "wall_seconds", "cost_usd", "world_size")
    }
    if figures["images_per_second"] is None:
        speeds = curve(record.rows, "train", "images_per_second").values
        figures["images_per_second"] = float(np.median(speeds)) if len(speeds) else None
    if figures["cost_usd"] is None:
        figures["cost_usd"] = _largest(record, "cost_usd")
    for size, duration in seconds.items():
        figures["inference_latency_seconds" if size == 1 else "inference_images_per_second"] = (
            duration if size == 1 else size / duration
        )
    stopped = record.summary.get("stopped_because")
    figures["stopped_because"] = str(stopped)[:40] if stopped else None if record.summary else "did not end"
    figures["hardware"] = record.hardware and record.hardware[:MAX_HARDWARE_LENGTH]
    return figures


def _largest(record: RunRecord, name: str) -> Any:
    """The largest value of a field of the training rows; an int where all are."""
    values = [value for row in record.rows if (value := finite_number(row.get(name))) is not None]
    largest = max(values, default=None)
    return int(largest) if largest is not None and largest.is_integer() else largest


def _skipped_steps(record: RunRecord) -> int | None:
    counted = record.number("skipped_steps")
    recorded = _largest(record, "skipped_steps")
    known = [int(value) for value in (counted, recorded) if value is not None]
    return max(known, default=None)
