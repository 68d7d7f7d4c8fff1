"""A picture and a table of a recipe's schedule: rate, momentum, resolution and what is frozen, over epochs.

It needs no data: without the data set on this disk, an epoch is taken to have as many images as ImageNet's.
The plateau follows the validation loss, which nobody knows beforehand: its rate is drawn dashed, uncut.

Example:
    python -m train.schedule configs/demo.yaml optimizer.peak_lr=0.01 --out schedule.png
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_prep.manifest import load_manifest
from data_prep.storage import is_s3, write_atomically
from train.config import PlateauPhase, Recipe, RecipeError, load_recipe
from train.data.folds import class_counts_of, fold_part
from train.data.order import num_steps_per_epoch
from train.optim import scaled_peak_lr
from train.schedule import Schedule

IMAGENET_SAMPLES = 1_281_167
MAX_POINTS = 4000
MAX_ROWS = 24
INK, MUTED, GRID, BAND = "#1b2430", "#5b6675", "#e3e7ec", "#f5f6f8"
BLUE, ORANGE, GREEN = "#1f6fb4", "#d1570c", "#0b7a5c"


@dataclass(frozen=True)
class Curves:
    """A schedule at some steps: arrays of shape (points,).

    Attributes:
        epochs: where, counted from 0, fractions included.
        rates, momenta: of these steps; of a plateau, those that it begins with.
        is_plateau: whether the rate depends on the validation loss.
        resolutions: sides in pixels.
    """

    epochs: np.ndarray
    rates: np.ndarray
    momenta: np.ndarray
    is_plateau: np.ndarray
    resolutions: np.ndarray


def compute_curves(recipe: Recipe, schedule: Schedule, steps_per_epoch: int) -> Curves:
    """The schedule at its steps, at most a few thousand of them, with both ends of each phase."""
    even = np.linspace(0, schedule.num_steps - 1, min(schedule.num_steps, MAX_POINTS)).astype(int)
    ends = [step for span in schedule.spans for step in (span.first_step, span.end_step - 1)]
    steps = sorted({*even.tolist(), *(step for step in ends if step >= 0)})
    pairs = [schedule.rate_at(step) for step in steps]
    return Curves(
        epochs=np.array(steps) / steps_per_epoch,
        rates=np.array([rate for rate, _ in pairs]),
        momenta=np.array([momentum for _, momentum in pairs]),
        is_plateau=np.array([isinstance(schedule.span_at(step).phase, PlateauPhase) for step in steps]),
        resolutions=np.array([recipe.data.resolution_at(step // steps_per_epoch) for step in steps]),
    )


def draw_schedule(recipe: Recipe, schedule: Schedule, steps_per_epoch: int, title: str) -> bytes:
    """The picture as PNG bytes."""
    curves = compute_curves(recipe, schedule, steps_per_epoch)
    figure = Figure(figsize=(9.6, 6.2), dpi=150, layout="constrained", facecolor="white")
    rate, momentum, resolution = figure.subplots(3, sharex=True, height_ratios=[5, 1.3, 1.3])
    for axes, label in ((rate, "learning rate"), (momentum, "momentum"), (resolution, "resolution, px")):
        _style(axes, label)
        _shade_phases(axes, schedule, steps_per_epoch)
    _draw_rate(rate, curves, schedule)
    names = _number_phases(rate, schedule, steps_per_epoch)
    momentum.plot(curves.epochs, curves.momenta, color=GREEN, lw=1.8)
    low, high = curves.momenta.min(), curves.momenta.max()
    margin = max(0.02, 0.2 * (high - low))
    momentum.set_ylim(low - margin, high + margin)
    resolution.step(curves.epochs, curves.resolutions, where="post", color=ORANGE, lw=1.8)
    sides = sorted(set(curves.resolutions.tolist()))
    resolution.set(ylim=(sides[0] * 0.9 - 4, sides[-1] * 1.1 + 4), xlabel="epoch")
    resolution.set_yticks(sides if len(sides) <= 3 else [sides[0], sides[-1]])
    end = schedule.num_steps / steps_per_epoch
    resolution.set_xlim(0, end)
    figure.suptitle(plain(title), x=0.01, ha="left", color=INK, fontsize=11, fontweight="bold")
    rate.set_title(plain(names), loc="left", color=MUTED, fontsize=8.5, pad=18)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def plain(text: str) -> str:
    """Text in which a dollar sign is one, and begins no formula."""
    return text.replace("$", r"\$")


def _style(axes: Axes, label: str) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)
    axes.set_ylabel(label, color=MUTED, fontsize=9)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=0, pad=5)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def _draw_rate(axes: Axes, curves: Curves, schedule: Schedule) -> None:
    known = np.where(curves.is_plateau, np.nan, curves.rates)
    axes.plot(curves.epochs, known, color=BLUE, lw=2)
    if curves.is_plateau.any():
        guess = np.where(curves.is_plateau, curves.rates, np.nan)
        axes.plot(curves.epochs, guess, color=BLUE, lw=2, ls=(0, (3, 2)))
        label = "dashed: follows the validation loss"
        axes.text(
            0.995, 0.97, label, transform=axes.transAxes, color=BLUE, fontsize=8.5, ha="right", va="top"
        )
    # Cuts by factors show on a logarithmic axis only; a cycle's shape on a linear one.
    peak = curves.rates.max()
    if any(span.phase.kind in ("step", "multi_step", "plateau") for span in schedule.spans):
        axes.set_yscale("log")
        least = min([rate for rate in curves.rates if rate > peak * 1e-4], default=peak)
        axes.set_ylim(least / 2, peak * 3)
        axes.minorticks_off()
    else:
        axes.set_ylim(0, peak * 1.12)


def _shade_phases(axes: Axes, schedule: Schedule, steps_per_epoch: int) -> None:
    for position, span in enumerate(schedule.spans):
        begin, end = span.first_step / steps_per_epoch, span.end_step / steps_per_epoch
        if position % 2:
            axes.axvspan(begin, end, color=BAND, zorder=0, lw=0)
        if span.phase.trainable != "all":
            axes.axvspan(begin, end, facecolor="none", edgecolor=GRID, hatch="////", lw=0, zorder=0.5)


def _number_phases(axes: Axes, schedule: Schedule, steps_per_epoch: int) -> str:
    """A number above each phase, and the line that says what the numbers mean.

    Phases may be too narrow for their names; a number has room nearly always.
    """
    total, names = schedule.spans[-1].end_step, []
    for number, span in enumerate(schedule.spans, start=1):
        trainable = span.phase.trainable
        learns = "the head" if trainable == "head" else ", ".join(trainable)
        note = "" if trainable == "all" else f" (hatched: only {learns} learns)"
        names.append(f"{number} {span.phase.kind.replace('_', ' ')}{note}")
        if (span.end_step - span.first_step) / total > 0.012:
            middle = (span.first_step + span.end_step) / 2 / steps_per_epoch
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            style = {"color": INK, "fontsize": 9, "ha": "center", "va": "bottom"}
            axes.annotate(str(number), (middle, 1), (0, 3), **place, **style)  # type: ignore[arg-type]
    return textwrap.fill("   ".join(names), 118)


def table(recipe: Recipe, schedule: Schedule, steps_per_epoch: int) -> str:
    """Rate, momentum and resolution at the begin of epochs: all of them, or some and those of new phases."""
    num_epochs = schedule.num_steps // steps_per_epoch
    stride = -(-num_epochs // MAX_ROWS)
    first = {span.first_step // steps_per_epoch: span for span in reversed(schedule.spans)}
    lines = [f"{'epoch':>5}  {'rate':>9}  {'momentum':>8}  {'pixels':>6}  phase"]
    for epoch in range(num_epochs):
        if epoch % stride and epoch not in first and epoch != num_epochs - 1:
            continue
        step = epoch * steps_per_epoch
        phase = schedule.span_at(step).phase
        rate, momentum = schedule.rate_at(step)
        note = ", follows the validation loss" if isinstance(phase, PlateauPhase) else ""
        if phase.trainable != "all":
            note += (
                f", trains {phase.trainable if phase.trainable == 'head' else ' and '.join(phase.trainable)}"
            )
        side = recipe.data.resolution_at(epoch)
        lines.append(f"{epoch:5d}  {rate:9.3g}  {momentum:8.3f}  {side:6d}  {phase.kind}{note}")
    rate, momentum = schedule.rate_at(schedule.num_steps - 1)
    lines.append(f"{'end':>5}  {rate:9.3g}  {momentum:8.3f}")
    return "\n".join(lines)


def _load(path: Path, overrides: list[str]) -> Recipe:
    """The recipe; one that leaves data.path to the command line is whole enough to be drawn."""
    try:
        return load_recipe(path, overrides)
    except RecipeError as error:
        if not any(fault.startswith("data.path is missing") for fault in error.faults):
            raise
        return load_recipe(path, [*overrides, "data.path=data/unknown"])


def _num_samples(recipe: Recipe, given: int | None) -> tuple[int, str]:
    """Training images of an epoch, and where that number is from."""
    if given is not None:
        return given, "as given"
    if not is_s3(str(recipe.data.path)):
        try:
            counts = class_counts_of(load_manifest(Path(recipe.data.path)), recipe.data)
            return sum(counts["train"]), f"of {recipe.data.path}"
        except (ValueError, OSError, KeyError):
            pass
    num_samples, like = IMAGENET_SAMPLES, "as in ImageNet"
    if (fold := fold_part(recipe.data, is_held_out=False)) is not None:
        # The size of a whole fold follows from their number and that of all images.
        num_samples = sum(fold.class_counts((num_samples,)))
        like += f" without fold {fold.fold} of {fold.num_folds}"
    return num_samples, f"{like}, since {recipe.data.path} is not on this disk"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.schedule", description="draw a recipe's schedule; needs no data"
    )
    parser.add_argument("recipe", type=Path, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, default=Path("schedule.png"), help="the picture (schedule.png)")
    parser.add_argument("--num-samples", type=int, help="training images, where the data is not on this disk")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = _load(options.recipe, options.overrides)
        num_samples, source = _num_samples(recipe, options.num_samples)
        batch = recipe.data.global_batch_size
        steps_per_epoch = num_steps_per_epoch(num_samples, batch)
        if steps_per_epoch < 1:
            raise ValueError(
                f"{num_samples:,} training images are fewer than one step of data.global_batch_size {batch}: "
                "choose a smaller one, or more --num-samples"
            )
        schedule = Schedule(
            recipe.schedule, recipe.optimizer, steps_per_epoch, scaled_peak_lr(recipe.optimizer, batch)
        )
        title = f"{options.recipe.stem}: {recipe.optimizer.name}, {recipe.num_epochs} epochs × "
        picture = draw_schedule(
            recipe, schedule, steps_per_epoch, f"{title}{steps_per_epoch:,} steps of {batch:,}"
        )
        write_atomically(options.out, picture)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(recipe, schedule, steps_per_epoch))
    print(f"{num_samples:,} training images ({source}); wrote {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
