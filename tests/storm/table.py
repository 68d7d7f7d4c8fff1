"""The outcome of a storm: a line a fault while it goes on, and a table at its end."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from train.distributed import Ranks, describe_hardware


@dataclass
class Outcome:
    """What became of one fault."""

    number: int
    kind: str
    words: str
    step: int  # that the training had come to
    resumed_from: int | None = None  # None: no new start was needed, or the training had just finished
    steps_lost: int = 0
    seconds: float | None = None  # until the next step was done
    problem: str = ""

    @property
    def is_survived(self) -> bool:
        return not self.problem

    def line(self) -> str:
        now = datetime.datetime.now().strftime("%H:%M:%S")
        what = f"{self.kind}, {self.words}" if self.words else self.kind
        text = f"{now} fault {self.number}: {what}, at step {self.step}"
        if self.problem:
            return f"{text} → NOT SURVIVED: {self.problem}"
        if self.resumed_from is not None:
            again = "step" if self.steps_lost == 1 else "steps"
            text += f" → resumed from {self.resumed_from}, {self.steps_lost} {again} again"
        elif self.seconds is not None:
            text += " → went on"
        else:
            text += " → had just finished"
        return text if self.seconds is None else f"{text}, {self.seconds:.1f} s"


@dataclass
class Tally:
    """All of a storm."""

    command: str
    outcomes: list[Outcome] = field(default_factory=list)
    loaders: list[str] = field(default_factory=list)  # of each round that came to its end
    num_equal: int = 0  # rounds whose end was that of the calm run
    num_starts: int = 0
    num_steps: int = 0
    first_step_seconds: list[float] = field(default_factory=list)
    faults_of_rounds: list[str] = field(default_factory=list)  # sentences
    wall_seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return not self.faults_of_rounds and all(outcome.is_survived for outcome in self.outcomes)


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    lost = [outcome.steps_lost for outcome in outcomes]
    seconds = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
    median = f"{statistics.median(seconds):.1f}" if seconds else "–"
    survived = sum(outcome.is_survived for outcome in outcomes)
    mean = statistics.fmean(lost)
    return f"| {name} | {len(outcomes)} | {survived} | {mean:.1f} | {max(lost)} | {median} |"


def markdown(tally: Tally) -> str:
    """The table, and under it what it was measured with."""
    lines = [
        "| fault | injected | survived | steps again: mean | max | seconds to the next step: median |",
        "|---|---|---|---|---|---|",
    ]
    for kind in sorted({outcome.kind for outcome in tally.outcomes}):
        lines.append(_row(kind, [outcome for outcome in tally.outcomes if outcome.kind == kind]))
    if tally.outcomes:
        lines.append(_row("**all**", tally.outcomes))
    rounds = len(tally.loaders)
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"), 1)
    loaders = ", ".join(f"{loader} {tally.loaders.count(loader)}" for loader in sorted(set(tally.loaders)))
    lines += [
        "",
        f"{rounds} trainings ({loaders}), {tally.num_steps:,} steps, "
        f"{tally.num_starts} starts by the launcher; "
        f"{tally.num_equal} of {rounds} ended bit for bit as their calm run did.",
    ]
    if starts := tally.first_step_seconds:
        lines.append(
            f"From a start to its first step: median {statistics.median(starts):.1f} s, "
            f"at most {max(starts):.1f} s ({len(starts)} starts, those by torchrun included)."
        )
    today = datetime.date.today().isoformat()
    lines += [
        f"`{tally.command}`, {tally.wall_seconds / 60:.1f} minutes, {describe_hardware(ranks)}, "
        f"torch {torch.__version__}, {today}.",
    ]
    lines += [f"- {sentence}" for sentence in tally.faults_of_rounds]
    return "\n".join(lines) + "\n"
