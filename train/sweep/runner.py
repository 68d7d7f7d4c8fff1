"""The sweep itself: trial after trial, until there are as many as wanted.

All of it is in `runs/<name>/`: `recipe.yaml` (with the fixed overrides, what every trial starts from),
`sweep.db`, `sweep.json`, `sweep.html`, `trials/trial-0001` (run folders) and `trials/trial-0001.log`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from train.config import Recipe, RecipeError, load_recipe
from train.run_folder import RECIPE_NAME
from train.sweep.page import PAGE_NAME, TABLE_NAME, trial_name, value_figure, write_page
from train.sweep.parent import ParentRun
from train.sweep.space import overrides_of
from train.sweep.study import Definition, best_trial, ended_trials, next_trial, report
from train.sweep.trial import Outcome, StopRequest, TrialStart, run_trial, wait_for_orphan
from train.tracking.console import duration

MAX_FAILURES = 3  # in a row; then something is wrong with more than the values
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


@dataclass
class Sweep:
    """A sweep under way."""

    folder: Path
    recipe: Recipe  # with the fixed overrides
    definition: Definition
    study: optuna.Study
    parent: ParentRun
    num_trials: int
    num_ranks: int
    stop: StopRequest
    say: Callable[[str], None] = print

    @property
    def num_ended(self) -> int:
        return len(ended_trials(self.study))


def run_sweep(sweep: Sweep) -> str | None:
    """Train what is missing; why it ended before that (also in `sweep.stop`), or None."""
    failures: list[str] = []
    while sweep.num_ended < sweep.num_trials and sweep.stop.signal is None:
        trial = next_trial(sweep.study, sweep.definition)
        began = time.monotonic()
        outcome = train_trial(sweep, trial)
        if outcome.state == "stopped":
            return outcome.reason
        end_trial(sweep, trial, outcome, time.monotonic() - began)
        failures = [*failures, outcome.reason] if outcome.state == "failed" else []
        if len(failures) == MAX_FAILURES:
            return f"{MAX_FAILURES} trials in a row failed, the last one with: {failures[-1]}"
    return None


def train_trial(sweep: Sweep, trial: optuna.Trial) -> Outcome:
    """Train one trial in its own run folder, where an interrupted one goes on."""
    name = trial_name(trial.number)
    overrides = overrides_of(trial.params)
    if sweep.parent.run_id is not None:
        overrides.append(f"tracking.parent_run_id={sweep.parent.run_id}")
    start = TrialStart(
        recipe=sweep.folder / RECIPE_NAME,
        folder=sweep.folder / "trials" / name,
        overrides=overrides,
        log=sweep.folder / "trials" / f"{name}.log",
        num_ranks=sweep.num_ranks,
        environment=sweep.parent.environment,
    )
    try:
        num_epochs = load_recipe(start.recipe, overrides).num_epochs
    except RecipeError as error:  # each end is possible, but not these together
        return Outcome("failed", None, "; ".join(error.faults))
    wait_for_orphan(start.folder, sweep.stop, sweep.say)

    def should_prune(epoch: int, value: float) -> bool:
        # After the last epoch there is nothing left to spare.
        return report(sweep.study, trial, epoch, value) and epoch < num_epochs

    return run_trial(start, sweep.definition.metric, should_prune, sweep.stop)


def end_trial(sweep: Sweep, trial: optuna.Trial, outcome: Outcome, seconds: float) -> None:
    """Tell Optuna, the page, MLflow and the terminal."""
    if outcome.reason:
        trial.set_user_attr("reason", outcome.reason)
    # Optuna itself knows when a trial was begun, but not that it lay interrupted for a night.
    trial.set_user_attr("seconds", round(seconds, 1))
    values = outcome.value if outcome.state == "complete" else None
    sweep.study.tell(trial, values, STATES[outcome.state])
    write_page(sweep.folder, sweep.study, sweep.definition, sweep.num_trials, sweep.num_ranks)
    best = best_trial(sweep.study)
    figures = {} if best is None else {f"sweep_best_{sweep.definition.metric}": best.value or 0.0}
    sweep.parent.trial_ended(trial_name(trial.number), outcome.state, figures, trial.number)
    sweep.say(trial_line(sweep, trial, outcome, best))


def trial_line(sweep: Sweep, trial: optuna.Trial, outcome: Outcome, best: FrozenTrial | None) -> str:
    """`trial 3/20  optimizer.peak_lr=0.1  top1 71.20%  complete  best 71.20% (trial 3)  0:12:10 to go`."""
    metric = sweep.definition.metric
    width = len(str(sweep.num_trials))
    value = f"{metric} {value_figure(metric, outcome.value)}" if outcome.value is not None else ""
    ended = ended_trials(sweep.study)
    seconds = [trial.user_attrs.get("seconds", 0.0) for trial in ended]
    left = sweep.num_trials - len(ended)
    parts = [
        f"trial {trial.number + 1:{width}d}/{sweep.num_trials}",
        " ".join(overrides_of(trial.params)),
        value,
        f"{outcome.state}: {outcome.reason}" if outcome.state == "failed" else outcome.state,
        f"best {value_figure(metric, best.value)} (trial {best.number + 1})" if best else "",
        f"about {duration(sum(seconds) / len(seconds) * left)} to go" if left else "",
    ]
    return "  ".join(part for part in parts if part)


def finish(sweep: Sweep, reason: str | None) -> None:
    """The last page, and the end of the MLflow run."""
    write_page(sweep.folder, sweep.study, sweep.definition, sweep.num_trials, sweep.num_ranks)
    best = best_trial(sweep.study)
    tags: dict[str, Any] = {"sweep.trials": str(sweep.num_ended)}
    if best is not None:
        tags |= {"best.trial": trial_name(best.number)}
        tags |= {
            f"best.{text.partition('=')[0]}": text.partition("=")[2] for text in overrides_of(best.params)
        }
    status = "FINISHED"
    if sweep.num_ended < sweep.num_trials:
        status = "FAILED" if reason and sweep.stop.signal is None else "KILLED"
    with contextlib.suppress(OSError):
        sweep.parent.finish(
            status, tags, [sweep.folder / name for name in (PAGE_NAME, TABLE_NAME, RECIPE_NAME)]
        )
