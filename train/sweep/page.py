"""What a sweep leaves: `sweep.html`, one page without outside parts, and `sweep.json` for programs."""

from __future__ import annotations

import datetime
import html
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from data_prep.page import page, tiles
from data_prep.storage import write_atomically
from train.run_folder import RECIPE_NAME
from train.sweep import plots
from train.sweep.space import overrides_of, value_text
from train.sweep.study import (
    MIN_TRIALS_FOR_IMPORTANCE,
    Definition,
    best_trial,
    ended_trials,
    importances,
)
from train.tracking.console import duration

PAGE_NAME, TABLE_NAME = "sweep.html", "sweep.json"
TRIALS_FOR_TRUST = 30  # with fewer, importance changes from sweep to sweep
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
STYLE = Path(__file__).with_name("page.css")
METRIC_NAMES = {"top1": "top-1", "top5": "top-5", "loss": "loss"}


def trial_name(number: int) -> str:
    """Of its run folder and MLflow run; people count from 1."""
    return f"trial-{number + 1:04d}"


def value_figure(metric: str, value: float | None) -> str:
    """As people read it: a percentage, or a loss."""
    if value is None:
        return ""
    return f"{value:.4f}" if metric == "loss" else f"{value:.2%}"


def write_page(
    folder: Path, study: optuna.Study, definition: Definition, num_trials: int, num_ranks: int
) -> None:
    """Write both files; what they say holds at this moment, trials still to come are counted."""
    table = sweep_table(folder, study, definition, num_trials, num_ranks)
    write_atomically(folder / TABLE_NAME, (json.dumps(table, indent=1) + "\n").encode())
    write_atomically(folder / PAGE_NAME, render(table, definition).encode())


def sweep_table(
    folder: Path, study: optuna.Study, definition: Definition, num_trials: int, num_ranks: int
) -> dict[str, Any]:
    """What `sweep.json` holds; trials are counted from 1."""
    best = best_trial(study)
    rows = [_row(trial) for trial in ended_trials(study)]
    return {
        "name": folder.name,
        "metric": definition.metric,
        "direction": definition.direction,
        "num_trials": num_trials,
        "spaces": {space.key: space.text for space in definition.spaces},
        "best": None if best is None else {**_row(best), "command": best_command(folder, best, num_ranks)},
        "importance": importances(study),
        "trials": rows,
    }


def best_command(folder: Path, best: FrozenTrial, num_ranks: int) -> str:
    """What trains with the best values, as a user types it."""
    launcher = "python" if num_ranks == 1 else f"torchrun --standalone --nproc-per-node={num_ranks}"
    words = [str(folder / RECIPE_NAME), *overrides_of(best.params), f"run.name={folder.name}-best"]
    return f"{launcher} -m train {' '.join(shlex.quote(word) for word in words)}"


def _row(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number + 1,
        "run": trial_name(trial.number),
        "state": STATES.get(trial.state, "running"),
        "value": trial.value,
        "epochs": max(trial.intermediate_values, default=0),
        "parameters": trial.params,
        "seconds": trial.user_attrs.get("seconds"),
        "reason": trial.user_attrs.get("reason", ""),
    }


def render(table: dict[str, Any], definition: Definition) -> str:
    """The page of a sweep's table."""
    return page(
        table["name"],
        "Sweep",
        _tiles(table),
        [_best(table), _plots(table, definition), _table(table)],
        f"Written {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC by python -m train.sweep; "
        f"the same figures are in {TABLE_NAME}.",
        STYLE.read_text(encoding="utf-8"),
        is_sortable=True,
    )


def _tiles(table: dict[str, Any]) -> str:
    rows, best, metric = table["trials"], table["best"], table["metric"]
    counts = Counter(row["state"] for row in rows)
    seconds = [row["seconds"] or 0.0 for row in rows]
    missing = table["num_trials"] - len(rows)
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    figures = [
        (f"best {METRIC_NAMES[metric]}", value_figure(metric, best["value"]) if best else "—", "")
        if best is None
        else (f"best {METRIC_NAMES[metric]}", value_figure(metric, best["value"]), f"trial {best['number']}"),
        ("trials", str(len(rows)), states + (f", {missing} to come" if missing > 0 else "")),
        ("training time", duration(sum(seconds)), f"{duration(sum(seconds) / max(len(rows), 1))} a trial"),
    ]
    return tiles(figures, is_headline=True)


def _best(table: dict[str, Any]) -> str:
    best = table["best"]
    if best is None:
        return '<h2>Best trial</h2><p class="note">No trial has trained to its end yet.</p>'
    pairs = "".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value_text(value))}"
        f'<span class="note"> of {html.escape(table["spaces"].get(key, ""))}</span></dd></div>'
        for key, value in best["parameters"].items()
    )
    return (
        f'<h2>Best trial</h2><dl class="card details">{pairs}</dl>'
        '<p class="note above">To train with these values:</p>'
        f'<pre class="card">{html.escape(best["command"])}</pre>'
        '<p class="note">The best of several trials was chosen on the images that it is measured on, so its '
        "figure is a little too good. Trials a few tenths of a percent apart may differ by their seeds only: "
        "train the best ones again with other seeds before you rely on the difference.</p>"
    )


def _plots(table: dict[str, Any], definition: Definition) -> str:
    rows, metric = table["trials"], table["metric"]
    if not any(row["value"] is not None for row in rows):
        return ""

    def tick(value: float) -> str:
        return f"{value:.3g}" if metric == "loss" else f"{value * 100:.4g}%"

    name, lower = METRIC_NAMES[metric], metric == "loss"
    past = f"at the {'upper' if lower else 'lower'} edge, if it lies beyond"
    scatters = (
        _image(plots.scatter(rows, space.key, space.is_log, tick, lower), f"{name} over {space.key}")
        for space in definition.spaces
    )
    return "\n".join(
        [
            '<div class="duo"><section>',
            f'<h2>History</h2><p class="note">Validation {name} of every trial. A pruned one stands at its '
            f"last epoch ({past}); it was compared with others at that same epoch.</p>",
            _image(plots.history(rows, tick, lower), f"{name} of each trial"),
            f"</section>{_importance(table)}</div>",
            f'<h2>Parameters</h2><p class="note">Validation {name} over each parameter that was varied.</p>',
            f'<div class="grid">{"".join(scatters)}</div>',
        ]
    )


def _importance(table: dict[str, Any]) -> str:
    count = sum(row["state"] == "complete" for row in table["trials"])
    shares = table["importance"]
    if len(table["spaces"]) < 2:
        return ""
    if not shares:
        return (
            '<section><h2>Importance</h2><p class="note">Which parameter matters cannot be told: that takes '
            f"at least {MIN_TRIALS_FOR_IMPORTANCE} trials that trained to their end with different results, "
            f"and there are {count}.</p></section>"
        )
    trust = (
        f" That is few: below some {TRIALS_FOR_TRUST} trials these bars are mostly noise, and another seed "
        "may turn their order."
    )
    return (
        '<section><h2>Importance</h2><p class="note">By how much the values of good trials differ from '
        f"those of all (PED-ANOVA), from {count} trials that trained to their end"
        f" (not the pruned ones).{trust if count < TRIALS_FOR_TRUST else ''}</p>"
        + _image(plots.importance(shares), "importance of each parameter")
        + "</section>"
    )


def _image(uri: str, text: str) -> str:
    return f'<figure class="card plot"><img src="{uri}" alt="{html.escape(text)}"></figure>'


def _table(table: dict[str, Any]) -> str:
    keys = list(table["spaces"])
    heads = ["trial", METRIC_NAMES[table["metric"]], "state", *keys, "epochs", "time"]
    if any(row["reason"] for row in table["trials"]):
        heads.append("reason")
    head = "".join(f'<th><button type="button">{html.escape(name)}</button></th>' for name in heads)
    body = "".join(_table_row(row, keys, table) for row in table["trials"])
    return (
        '<h2>All trials</h2><div class="card table"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _table_row(row: dict[str, Any], keys: list[str], table: dict[str, Any]) -> str:
    cells = [
        (str(row["number"]), row["number"]),
        (value_figure(table["metric"], row["value"]), row["value"]),
        (row["state"], row["state"]),
        *((value_text(row["parameters"].get(key, "")), row["parameters"].get(key, "")) for key in keys),
        (str(row["epochs"]), row["epochs"]),
        (duration(row["seconds"] or 0), row["seconds"]),
    ]
    if any(other["reason"] for other in table["trials"]):
        cells.append((row["reason"], row["reason"]))
    is_best = table["best"] is not None and row["number"] == table["best"]["number"]
    kind = "best" if is_best else row["state"]
    return f'<tr class="{kind}">' + "".join(_cell(text, value) for text, value in cells) + "</tr>"


def _cell(text: str, value: Any) -> str:
    # Plain digits: the page's script sorts by them, and knows no exponents.
    plain = f"{value:.12f}" if isinstance(value, float) else "" if value is None else str(value)
    return f'<td data-value="{html.escape(plain)}">{html.escape(text)}</td>'
