"""The table of a comparison: which figures there are, what each means, and the table as Markdown and CSV.

The page shows a line a figure and a column a run; CSV has a row a run, with plain numbers: fractions, bytes,
seconds, dollars.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evaluation.compare.figures import ComparedRun
from evaluation.text import duration_text, interval_text, percent_text

DASH = "–"


@dataclass(frozen=True)
class Column:
    """A figure.

    Attributes:
        text: the figure → how the page says it. note: all figures of the run → a few words under it.
        better: which end is the better one; None where neither is.
        meaning: its definition, for the notes of the page.
    """

    key: str
    title: str
    group: str
    text: Callable[[Any], str]
    better: Literal["high", "low"] | None = None
    meaning: str = ""
    note: Callable[[Mapping[str, Any]], str] = lambda figures: ""


def bytes_text(size: float) -> str:
    """`45.3 MB`, `1.25 GB`, in powers of ten."""
    if size < 1e9:
        return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"
    return f"{size / 1e9:,.2f} GB"


def count_of(value: float) -> str:
    """`11.7 M`, `1.81 G`, `43 k`."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:,.3g} {name}"
    return f"{value:,.0f}"


def rate_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def points_text(fraction: float) -> str:
    return f"{100 * fraction:.2f} points"


def _interval_note(key: str) -> Callable[[Mapping[str, Any]], str]:
    def note(figures: Mapping[str, Any]) -> str:
        low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
        return "" if low is None or high is None else interval_text((low, high))

    return note


def _percent(fraction: float) -> str:
    return percent_text(fraction)


def _epoch(value: float) -> str:
    return f"{value:.4g}"


def _dollars(value: float) -> str:
    return f"${value:,.2f}" if value >= 0.1 or value == 0 else f"${value:.2g}"


def _accuracy(key: str, title: str, group: str, meaning: str) -> Column:
    return Column(key, title, group, _percent, "high", meaning, _interval_note(key))


ON_COMMON, BY_RUN, SIZE, MEMORY, SPEED, CALM = (
    "On the same images",
    "By the run’s own validations",
    "Size and arithmetic",
    "Memory",
    "Speed and money",
    "Stability",
)

COLUMNS: tuple[Column, ...] = (
    _accuracy("top1", "Top-1", ON_COMMON, "Share of the common images whose first answer is right, by the best "
              "checkpoint of the run; below it the 95% Wilson score interval."),
    _accuracy("top5", "Top-5", ON_COMMON, "Share whose true class is among the first five answers; left out up to "
              "five classes."),
    _accuracy("best_top1", "Best top-1", BY_RUN, "The highest top-1 of all validations. It chose its epoch on the "
              "images that it is measured on, so it flatters a little, more so the more epochs there were."),
    _accuracy("best_top5", "Top-5 then", BY_RUN, "Top-5 of the same validation."),
    _accuracy("final_top1", "Final top-1", BY_RUN, "Top-1 after the last epoch: the figure that chose nothing."),
    _accuracy("final_top5", "Final top-5", BY_RUN, "Top-5 after the last epoch."),
    Column("best_epoch", "Epoch of the best", BY_RUN, _epoch, None, "Epochs done at the best validation.",
           lambda figures: f"of {figures['epochs']:.4g}" if "epochs" in figures else ""),
    Column("epochs_to_near_best", "Epochs to near the best", BY_RUN, _epoch, "low", "Epochs until top-1 was first "
           "within 1 point of the run’s own best: what a shorter training might save."),
    Column("num_parameters", "Parameters", SIZE, count_of, "low", "All weights and biases."),
    Column("forward_flops", "FLOPs of an image", SIZE, count_of, "low", "Floating-point operations of a forward "
           "pass of one image at the validation resolution, in convolutions and matrix products: a "
           "multiplication and an addition count as two, so FLOPs are 2 × MACs.",
           lambda figures: (f"{count_of(figures['forward_macs'])} MACs" if "forward_macs" in figures else "")
           + (f", {figures['resolution']:.0f} px" if "resolution" in figures else "")),
    Column("file_bytes", "Model file", SIZE, bytes_text, "low", "Weights alone: best.safetensors, or where there is "
           "none parameters and buffers as they are stored. MB are 10⁶ bytes."),
    Column("training_memory_bytes", "Training, as recorded", MEMORY, bytes_text, "low", "The peak that the run "
           "recorded of its first rank: what torch allocated on the GPU, or on a CPU the whole process with "
           "Python and libraries. These two must not be compared with each other.",
           lambda figures: str(figures.get("training_memory_of", ""))),
    Column("step_memory_bytes", "A training step, measured", MEMORY, bytes_text, "low", "Peak of a training step "
           "with the run’s micro-batch at its largest resolution, weights, gradients and optimizer included, in "
           "a process of its own on this machine: on a CPU its resident memory above what it was before the "
           "network was built. Not measured where the run recorded a GPU’s.",
           lambda figures: f"{figures['step_micro_batch_size']} images" if "step_micro_batch_size" in figures else ""),
    Column("inference_memory_bytes_1", "Inference, batch 1", MEMORY, bytes_text, "low", "The same of a forward pass of "
           "one image, weights included."),
    Column("inference_memory_bytes_64", "Inference, batch 64", MEMORY, bytes_text, "low", "The same of 64 images."),
    Column("images_per_second", "Training, images/s", SPEED, rate_text, "high", "Over the whole training, of all ranks, "
           "as recorded there, on the hardware named below it; validation is not in it.",
           lambda figures: str(figures.get("hardware", ""))),
    Column("inference_images_per_second", "Inference, images/s", SPEED, rate_text, "high", "64 images divided by the "
           "median time of a forward pass with normalisation on this machine, after two that warm up; no "
           "decoding, no mirrored images, not compiled."),
    Column("inference_latency_seconds", "Latency of one image", SPEED, lambda value: f"{1000 * value:,.3g} ms", "low",
           "The median time of a forward pass of one image, measured in the same way."),
    Column("wall_seconds", "Time of the training", SPEED, duration_text, "low", "From its start to its end, all starts "
           "together, validation included."),
    Column("cost_usd", "Cost", SPEED, _dollars, "low", "That time at the price of the recipe; a dash where it named "
           "none."),
    Column("stopped_because", "How it ended", SPEED, str, None, "Finished; early stopping; budget; or it did not end."),
    Column("stability", "In a word", CALM, str, None, "By the rule below.",
           lambda figures: str(figures.get("stability_reason", ""))),
    Column("loss_spikes", "Loss spikes", CALM, str, "low", "Training rows whose loss lies more than 6 robust standard "
           "deviations (1.4826 × the median absolute deviation, at least 5% of the median) above the median of "
           "the 31 rows before. A row is the mean of some steps, so a spike of a single step may be hidden in "
           "it. After three rows in a row the new level is the usual one.",
           lambda figures: f"{figures['loss_spikes_of_run']} by the run’s own count of steps"
           if "loss_spikes_of_run" in figures else ""),
    Column("skipped_steps", "Skipped steps", CALM, str, "low", "Updates that the run left out for a loss or gradient "
           "that was not finite."),
    Column("top1_deviation", "Spread of top-1", CALM, points_text, "low", "Standard deviation (n − 1) of the validation "
           "top-1 over the last quarter of the validations, at least three; below it the same about their "
           "straight line, so that a steady rise does not count.",
           lambda figures: f"{points_text(figures['top1_trend_deviation'])} about its trend"
           if "top1_trend_deviation" in figures else ""),
    Column("val_loss_deviation", "Spread of validation loss", CALM, lambda value: f"{value:.3g}", "low", "Standard "
           "deviation of the validation loss over the same validations."),
    Column("largest_drop", "Largest drop of top-1", CALM, points_text, "low", "From one validation to the next; 0 where "
           "it never fell.",
           lambda figures: f"at epoch {figures['largest_drop_epoch']:.4g}" if "largest_drop_epoch" in figures else ""),
)  # fmt: skip

# Figures of a run that the CSV and JSON have beside those of the columns.
FURTHER = (
    "num_images", "num_own_images", "epochs", "forward_macs", "resolution", "training_memory_of",
    "step_micro_batch_size", "world_size", "hardware", "stability_reason", "loss_spikes_of_run",
    "top1_trend_deviation", "largest_drop_epoch",
)  # fmt: skip


def shown_columns(runs: Sequence[ComparedRun]) -> list[Column]:
    """Those that any run has a figure for."""
    return [column for column in COLUMNS if any(column.key in run.figures for run in runs)]


def cell(column: Column, run: ComparedRun) -> tuple[str, str]:
    """(the figure as text, a note under it); (dash, "") where it is not known."""
    if column.key not in run.figures:
        return DASH, ""
    return column.text(run.figures[column.key]), column.note(run.figures)


def best_cells(column: Column, runs: Sequence[ComparedRun]) -> set[str]:
    """Letters of the runs with the best figure of a line; empty where all are equal or none is comparable."""
    values = {run.letter: run.figures[column.key] for run in runs if column.key in run.figures}
    if column.better is None or len(values) < 2 or len(set(values.values())) < 2:
        return set()
    if column.key == "training_memory_bytes" and len({r.figures.get("training_memory_of") for r in runs}) > 1:
        return set()
    if column.key == "images_per_second" and len({run.figures.get("hardware") for run in runs}) > 1:
        return set()
    best = (max if column.better == "high" else min)(values.values())
    return {letter for letter, value in values.items() if value == best}


def markdown_table(runs: Sequence[ComparedRun]) -> str:
    """A line a figure, a column a run."""
    lines = [_line(["", *(f"{run.letter}: {run.name}" for run in runs)]), _line(["---"] * (len(runs) + 1))]
    for column in shown_columns(runs):
        cells = []
        for run in runs:
            text, note = cell(column, run)
            cells.append(f"{text} ({note})" if note else text)
        lines.append(_line([f"{column.title} ({column.group.lower()})", *cells]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").replace("<", "&lt;").split()) for cell in cells) + " |"


def csv_table(runs: Sequence[ComparedRun]) -> str:
    """A row a run; empty where a figure is not known."""
    keys = ["letter", "run", "source", "model"]
    for column in COLUMNS:
        keys.append(column.key)
        keys += [f"{column.key}_{end}" for end in ("low", "high") if column.text is _percent]
    keys += FURTHER
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, keys, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        names = {"letter": run.letter, "run": run.name, "source": run.record.source, "model": model_text(run)}
        writer.writerow({key: _harmless(value) for key, value in (names | run.figures).items()})
    return buffer.getvalue()


def _harmless(value: Any) -> Any:
    """Spreadsheets take a text that begins so for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" else value


def model_text(run: ComparedRun) -> str:
    if run.record.recipe is None:
        return "not known"
    model = run.record.recipe.model
    return f"{model.library} {model.name}"
