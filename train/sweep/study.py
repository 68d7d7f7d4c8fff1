"""The memory of a sweep: an Optuna study in `sweep.db`, and what it chooses and compares.

TPE chooses the values; its random numbers follow from (seed, trial), so an interrupted sweep goes on as if it
had not been. The median pruner ends a trial whose best value so far is worse than the median of the others
at the same epoch. Hyperband would need some tens of trials before its brackets say anything, and a sweep of
whole trainings rarely has them.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from train.sweep.space import Space

try:
    import optuna
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.exc import SQLAlchemyError
except ImportError:
    raise ImportError("Optuna is not installed: pip install optuna") from None

DATABASE = "sweep.db"
Metric = Literal["top1", "top5", "loss"]
# A median of fewer trials than this says nothing.
NUM_TRIALS_BEFORE_PRUNING = 5
MIN_TRIALS_AT_EPOCH = 3
EPOCHS_BEFORE_PRUNING = 1 / 3  # of all; at high rates, early epochs tell little about the last one
MIN_TRIALS_FOR_IMPORTANCE = 4

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the sweep says it itself


@dataclass(frozen=True)
class Definition:
    """What must not change while a sweep is under way; its recipe is compared apart."""

    spaces: tuple[Space, ...]
    metric: Metric
    seed: int

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "minimize" if self.metric == "loss" else "maximize"

    def as_text(self) -> str:
        spaces = {space.key: space.text for space in self.spaces}
        return json.dumps({"spaces": spaces, "metric": self.metric, "seed": self.seed}, sort_keys=True)


def open_study(folder: Path, definition: Definition, num_epochs: int, pruning: bool) -> optuna.Study:
    """The study in `folder`, made or found.

    Raises:
        ValueError: the folder's sweep was started with other spaces, metric or seed, or cannot be read.
    """
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if pruning:
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=NUM_TRIALS_BEFORE_PRUNING,
            n_warmup_steps=math.ceil(num_epochs * EPOCHS_BEFORE_PRUNING),
            n_min_trials=MIN_TRIALS_AT_EPOCH,
        )
    path = folder / DATABASE
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name="sweep",
            direction=definition.direction,
            pruner=pruner,
            load_if_exists=True,
        )
        former = study.user_attrs.get("definition")
        if former is None:
            study.set_user_attr("definition", definition.as_text())
    except (SQLAlchemyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:150]
        raise ValueError(f"{path} cannot be read ({reason}): choose another --name") from None
    if former is not None and former != definition.as_text():
        differences = "; ".join(_differences(json.loads(former), json.loads(definition.as_text())))
        raise ValueError(
            f"sweep {folder.name} was started with other searches ({differences}): choose another --name, or "
            "go back to those"
        )
    return study


def _differences(former: dict[str, Any], now: dict[str, Any]) -> list[str]:
    pairs = [("--metric", former["metric"], now["metric"]), ("--seed", former["seed"], now["seed"])]
    keys = sorted({*former["spaces"], *now["spaces"]})
    pairs += [(key, former["spaces"].get(key), now["spaces"].get(key)) for key in keys]
    return [f"{key}: was {a or 'fixed'}, now {b or 'fixed'}" for key, a, b in pairs if a != b]


def next_trial(study: optuna.Study, definition: Definition) -> optuna.Trial:
    """The one that was interrupted, or else a new one, with all its values chosen."""
    open_ones = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    number = open_ones[0].number if open_ones else len(study.get_trials(deepcopy=False))
    seed = int(np.random.SeedSequence([definition.seed, number]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    trial = optuna.Trial(study, open_ones[0]._trial_id) if open_ones else study.ask()
    for space in definition.spaces:
        space.suggest(trial)
    return trial


def report(study: optuna.Study, trial: optuna.Trial, epoch: int, value: float) -> bool:
    """Note a validation; whether the trial is so far behind the others at this epoch that it may end."""
    if epoch not in study.get_trials(deepcopy=False)[trial.number].intermediate_values:
        trial.report(value, epoch)
    return trial.should_prune()


def ended_trials(study: optuna.Study) -> list[FrozenTrial]:
    """In their order; the interrupted one is not among them."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best of those that trained to their end."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    return min(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)


def importances(study: optuna.Study) -> dict[str, float]:
    """Key → share of the importance, by PED-ANOVA (Watanabe et al., 2023); empty with too few trials.

    It asks how much the values of good trials differ from those of all, and needs no further package.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < MIN_TRIALS_FOR_IMPORTANCE:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls the evaluator experimental
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        try:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # e.g. all values are equal
            return {}
    return {key: value for key, value in found.items() if math.isfinite(value)}
