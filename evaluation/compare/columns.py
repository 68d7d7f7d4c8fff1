"""Which figures a comparison has, how each is written, and what it means.

The page shows a line a figure and a column a run; CSV has a row a run, with plain numbers: fractions, bytes,
seconds, dollars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evaluation.text import duration_text, interval_text, percent_text

ON_COMMON, BY_RUN, SIZE, MEMORY, SPEED, CALM = (
    "On the same images",
    "By the run’s own validations",
    "Size and arithmetic",
    "Memory",
    "Speed and money",
    "Stability",
)


@dataclass(frozen=True)
class Column:
    """A figure.

    Attributes:
        text: the figure → how the page says it. note: all figures of a run → a few words under it.
        better: which end is the better one; None where neither is.
        like: another figure that must be equal for two runs to be compared in this one.
    """

    key: str
    title: str
    group: str
    text: Callable[[Any], str] = str
    better: Literal["high", "low"] | None = None
    note: Callable[[Mapping[str, Any]], str] = lambda figures: ""
    like: str | None = None

    @property
    def meaning(self) -> str:
        """Its definition, for the notes of the page."""
        return MEANINGS[self.key]


def bytes_text(size: float) -> str:
    """`45.3 MB`, `1.25 GB`, in powers of ten."""
    if size < 1e9:
        return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"
    return f"{size / 1e9:,.2f} GB"


def count_of(value: float) -> str:
    """`11.7 M`, `1.81 G`, `43 k`."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            scaled = value / unit
            return f"{scaled:,.0f} {name}" if scaled >= 100 else f"{scaled:,.3g} {name}"
    return f"{value:,.0f}"


def rate_text(value: float) -> str:
    """`1,234`, `45.6`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def points_text(fraction: float) -> str:
    """`1.25 points`."""
    return f"{100 * fraction:.2f} points"


def _epoch(value: float) -> str:
    return f"{value:.4g}"


def _dollars(value: float) -> str:
    return f"${value:,.2f}" if value >= 0.1 or value == 0 else f"${value:.2g}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.3g} ms"


def _three_digits(value: float) -> str:
    return f"{value:.3g}"


def _interval_note(key: str) -> Callable[[Mapping[str, Any]], str]:
    def note(figures: Mapping[str, Any]) -> str:
        low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
        return "" if low is None or high is None else interval_text((low, high))

    return note


def _words(key: str, pattern: str = "{}") -> Callable[[Mapping[str, Any]], str]:
    """A note with another figure in it, where the run has it."""
    return lambda figures: pattern.format(figures[key]) if key in figures else ""


def _arithmetic(figures: Mapping[str, Any]) -> str:
    macs = f"{count_of(figures['forward_macs'])} MACs" if "forward_macs" in figures else ""
    return macs + (f", {figures['resolution']:.0f} px" if "resolution" in figures else "")


def _trend(figures: Mapping[str, Any]) -> str:
    deviation = figures.get("top1_trend_deviation")
    return "" if deviation is None else f"{points_text(deviation)} about its trend"


def _accuracy(key: str, title: str, group: str) -> Column:
    return Column(key, title, group, percent_text, "high", _interval_note(key))


COLUMNS: tuple[Column, ...] = (
    _accuracy("top1", "Top-1", ON_COMMON),
    _accuracy("top5", "Top-5", ON_COMMON),
    _accuracy("best_top1", "Best top-1", BY_RUN),
    _accuracy("best_top5", "Top-5 then", BY_RUN),
    _accuracy("final_top1", "Final top-1", BY_RUN),
    _accuracy("final_top5", "Final top-5", BY_RUN),
    Column("best_epoch", "Epoch of the best", BY_RUN, _epoch, None, _words("epochs", "of {:.4g}")),
    Column("epochs_to_near_best", "Epochs to near the best", BY_RUN, _epoch),
    Column("num_parameters", "Parameters", SIZE, count_of, "low"),
    Column("forward_flops", "FLOPs of an image", SIZE, count_of, "low", _arithmetic),
    Column("file_bytes", "Model file", SIZE, bytes_text, "low"),
    Column(
        "training_memory_bytes", "Training, as recorded", MEMORY, bytes_text, "low",
        _words("training_memory_of"), like="training_memory_of",
    ),
    Column(
        "step_memory_bytes", "A training step, measured", MEMORY, bytes_text, "low",
        _words("step_micro_batch_size", "{} images"), like="step_micro_batch_size",
    ),
    Column("inference_memory_bytes_1", "Inference, batch 1", MEMORY, bytes_text, "low"),
    Column("inference_memory_bytes_64", "Inference, batch 64", MEMORY, bytes_text, "low"),
    Column(
        "images_per_second", "Training, images/s", SPEED, rate_text, "high",
        _words("hardware"), like="hardware",
    ),
    Column("inference_images_per_second", "Inference, images/s", SPEED, rate_text, "high"),
    Column("inference_latency_seconds", "Latency of one image", SPEED, _milliseconds, "low"),
    Column("wall_seconds", "Time of the training", SPEED, duration_text, "low"),
    Column("cost_usd", "Cost", SPEED, _dollars, "low"),
    Column("stopped_because", "How it ended", SPEED),
    Column("stability", "In a word", CALM, note=_words("stability_reason")),
    Column(
        "loss_spikes", "Loss spikes", CALM, str, "low",
        _words("loss_spikes_of_run", "{} by the run’s own count"),
    ),
    Column("skipped_steps", "Skipped steps", CALM, str, "low"),
    Column("top1_deviation", "Spread of top-1", CALM, points_text, "low", _trend),
    Column("val_loss_deviation", "Spread of validation loss", CALM, _three_digits, "low"),
    Column(
        "largest_drop", "Largest drop of top-1", CALM, points_text, "low",
        _words("largest_drop_epoch", "at epoch {:.4g}"),
    ),
)  # fmt: skip

# Figures of a run that CSV and JSON have beside those.
FURTHER = (
    "num_images",
    "num_own_images",
    "epochs",
    "forward_macs",
    "resolution",
    "training_memory_of",
    "step_micro_batch_size",
    "world_size",
    "hardware",
    "stability_reason",
    "loss_spikes_of_run",
    "top1_trend_deviation",
    "largest_drop_epoch",
)

MEANINGS = {
    "top1": "Share of the common images whose first answer is right, by the best checkpoint of the run at "
    "its own validation resolution; below it the 95% interval.",
    "top5": "Share whose true class is among the first five answers; left out up to five classes.",
    "best_top1": "The highest top-1 of all validations. It chose its epoch on the images that it is "
    "measured on, so it flatters a little, the more so the more epochs there were.",
    "best_top5": "Top-5 of the same validation.",
    "final_top1": "Top-1 after the last epoch: the figure that chose nothing.",
    "final_top5": "Top-5 after the last epoch.",
    "best_epoch": "Epochs done at the best validation.",
    "epochs_to_near_best": "Epochs until top-1 was first within 1 point of the run’s own best: what a "
    "shorter training might save.",
    "num_parameters": "All weights and biases.",
    "forward_flops": "Floating-point operations of a forward pass of one image at the validation "
    "resolution, in convolutions and matrix products. A multiplication and an addition count as two, so "
    "FLOPs are 2 × MACs.",
    "file_bytes": "The weights alone: best.safetensors, or where there is none parameters and buffers as "
    "they are stored. A MB is 10⁶ bytes.",
    "training_memory_bytes": "The peak that the run recorded for its first rank: what torch allocated on "
    "the GPU, or on a CPU the whole process with Python and libraries. These two must not be compared.",
    "step_memory_bytes": "Peak of a training step with the run’s micro-batch at its largest resolution "
    "(weights, gradients and optimizer included), in a process of its own on this machine: on a CPU its "
    "resident memory above what it was before the network was built, on CUDA what torch allocated. Not "
    "measured where the run recorded a GPU’s.",
    "inference_memory_bytes_1": "Peak of a forward pass of one image, weights included, in a process of its "
    "own on this machine: on a CPU its resident memory above what it was before the network was built, on "
    "CUDA what torch allocated.",
    "inference_memory_bytes_64": "The same of 64 images.",
    "images_per_second": "Over the whole training, of all ranks, as recorded there, on the hardware named "
    "below it; validations are not in it.",
    "inference_images_per_second": "64 images divided by the median time of a forward pass with "
    "normalisation on this machine, after two passes that warm up; no decoding, no mirrored images, not "
    "compiled.",
    "inference_latency_seconds": "The median time of a forward pass of one image, measured in the same way.",
    "wall_seconds": "From its start to its end, all starts together, validations included.",
    "cost_usd": "That time at the price that the recipe names; a dash where it names none.",
    "stopped_because": "Finished, early stopping, budget; or that it did not end.",
    "stability": "By the rule below.",
    "loss_spikes": "Training rows whose loss lies more than 6 robust standard deviations (1.4826 × the "
    "median absolute deviation, at least 5% of the median) above the median of the 31 rows before. A row "
    "is the mean of some steps, so a spike of one step may be hidden in it; the run’s own count is of "
    "steps. After three such rows in a row the new level is the usual one.",
    "skipped_steps": "Updates that the run left out for a loss or gradient that was not finite.",
    "top1_deviation": "Standard deviation (n − 1) of the validation top-1 over the last quarter of the "
    "validations, at least three; below it the same about their straight line, so that a steady rise is no "
    "unrest.",
    "val_loss_deviation": "Standard deviation (n − 1) of the validation loss over the same validations.",
    "largest_drop": "From one validation to the next; 0 where it never fell.",
}

# Terms that are no line of the table.
TERMS = (
    (
        "95% interval",
        "Of an accuracy: Wilson’s score interval, within which other images of the same kind would put it. "
        "Intervals of two runs that overlap do not mean that the runs cannot be told apart: on the same "
        "images the paired test sees more.",
    ),
    (
        "McNemar’s test",
        "Only images count that one of two runs has right and the other wrong. If both were equally good, "
        "each such image would be a coin’s throw; p is how often throws come out as unequal as this or "
        "more (exact, binomial, two-sided).",
    ),
    (
        "Holm’s correction",
        "With several runs against one, some p comes out small by chance. Holm’s correction raises them so "
        "that the whole family errs in at most 5% of cases. “Better” and “worse” are said below 0.05 after "
        "it. The intervals are of one pair each and not corrected: one may omit 0 where p allows chance.",
    ),
    (
        "Interval of a difference",
        "95%, by paired bootstrap: the images drawn anew with replacement 10,000 times (seed 0), the 2.5th "
        "and the 97.5th percentile of the difference. Where the runs differ on few images it is too narrow: "
        "then p is to be believed, which is exact.",
    ),
    (
        "What the tests do not know",
        "They are of these images and these checkpoints. Another seed of the same training gives another "
        "checkpoint, often a point away; and a best checkpoint chose its epoch on the validation images, "
        "as the best run its place on these.",
    ),
    (
        "Pareto front",
        "The runs that no other one beats: none is at least as accurate and at most as costly, and better "
        "in one of both.",
    ),
)
