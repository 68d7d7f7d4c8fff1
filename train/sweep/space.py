"""What a sweep may vary: search spaces as they are written on the command line.

`log:a..b` log-uniform, `a..b` uniform, `a..b:step` on a grid, `int:a..b` whole numbers (`int:a..b:step`),
`x|y|z` choices, each read as YAML. All else is a fixed override of the recipe; a value in quotes always is.

Example:
    >>> words = parse_words(["optimizer.peak_lr=log:0.01..1", "optimizer.name=sgd|adamw", "data.path=../x"])
    >>> [space.kind for space in words.spaces], words.fixed
    (['float', 'choice'], ['data.path=../x'])
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import yaml

if TYPE_CHECKING:
    from optuna import Trial

FORMS = "write log:a..b, a..b, a..b:step, int:a..b or x|y|z"
OWN_KEYS = {
    "run.name": "the sweep names its trials; --name names the sweep",
    "tracking.parent_run_id": "the sweep is the parent of its trials",
}
RANGE = re.compile(r"(?P<low>.*?)\.\.(?P<high>[^:]*)(?::(?P<step>.*))?")


@dataclass(frozen=True)
class Space:
    """Where one key may lie.

    Attributes:
        text: as it was written.
        low, high: both inclusive. step: of a grid that begins at `low`. choices: texts, each YAML.
    """

    key: str
    text: str
    kind: Literal["float", "int", "choice"]
    low: float = 0
    high: float = 0
    step: float | None = None
    is_log: bool = False
    choices: tuple[str, ...] = ()

    def suggest(self, trial: Trial) -> None:
        """Let the trial choose, or keep what it has chosen before."""
        if self.kind == "choice":
            trial.suggest_categorical(self.key, self.choices)
        elif self.kind == "int":
            trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step or 1))
        else:
            trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.is_log)

    @property
    def ends(self) -> list[str]:
        """Values that the recipe must take: the two ends of a range, or every choice."""
        return list(self.choices) or [value_text(self._number(end)) for end in (self.low, self.high)]

    def _number(self, value: float) -> float:
        return int(value) if self.kind == "int" else value


@dataclass
class Words:
    """The words behind the recipe, sorted; `faults` has a sentence for each that cannot be used."""

    spaces: list[Space] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def parse_words(words: list[str]) -> Words:
    """Tell spaces from fixed overrides, and collect all faults."""
    found = Words()
    seen: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            found.faults.append(f"{word!r} is not of the form section.key=value")
            continue
        if key in seen:
            found.faults.append(f"{key} is given twice")
            continue
        seen.add(key)
        if key in OWN_KEYS:
            found.faults.append(f"{key} cannot be set: {OWN_KEYS[key]}")
            continue
        try:
            space = parse_space(key, text)
        except ValueError as error:
            found.faults.append(str(error))
            continue
        if space is None:
            found.fixed.append(word)
        else:
            found.spaces.append(space)
    return found


def parse_space(key: str, text: str) -> Space | None:
    """The space that a value describes; None for a plain value.

    Raises:
        ValueError: it looks like a space and is none; says how to write it.
    """
    parts = _split_choices(text)
    if len(parts) > 1:
        return _choices(key, text, parts)
    prefix, _, rest = text.partition(":")
    if prefix in ("log", "int"):
        return _range(key, text, rest, prefix)
    # A number first: a path such as ../data is none, and quotes keep anything else from being taken for one.
    if ".." in text and re.match(r"[-+]?\.?\d", text):
        return _range(key, text, text, "")
    return None


def overrides_of(parameters: dict[str, Any]) -> list[str]:
    """`section.key=value` for each chosen value."""
    return [f"{key}={value_text(value)}" for key, value in parameters.items()]


def value_text(value: Any) -> str:
    """As YAML reads it; six digits of a fraction, which is finer than any search."""
    if isinstance(value, float):
        mantissa, e, exponent = f"{value:.6g}".partition("e")
        # YAML 1.1 takes 1e-05 for a text: it wants the point.
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}" if e else mantissa
    return str(value)


def _split_choices(text: str) -> list[str]:
    """At each `|` outside quotes and brackets."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "|" and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return parts


def _choices(key: str, text: str, parts: list[str]) -> Space:
    choices = tuple(part.strip() for part in parts)
    if not all(choices):
        raise ValueError(f"{key}: {text!r} has an empty choice: {FORMS}")
    if len(set(choices)) < len(choices):
        raise ValueError(f"{key}: {text!r} names a choice twice")
    for choice in choices:
        try:
            yaml.safe_load(choice)
        except (yaml.YAMLError, ValueError):
            raise ValueError(f"{key}: the choice {choice!r} of {text!r} is no valid YAML") from None
    return Space(key, text, "choice", choices=choices)


def _range(key: str, text: str, rest: str, prefix: str) -> Space:
    found = RANGE.fullmatch(rest)
    number = int if prefix == "int" else float
    try:
        if found is None:
            raise ValueError
        low, high = number(found["low"]), number(found["high"])
        step = None if found["step"] is None else number(found["step"])
    except ValueError:
        of_what = "whole numbers" if prefix == "int" else "numbers"
        raise ValueError(f"{key}: {text!r} is no range of {of_what}: {FORMS}") from None
    if not all(math.isfinite(value) for value in (low, high, step or 0)):
        raise ValueError(f"{key}: {text!r} must be of finite numbers")
    if low >= high:
        raise ValueError(f"{key}: {text!r} must begin below its end")
    if prefix == "log" and low <= 0:
        raise ValueError(f"{key}: {text!r} must begin above 0, since it is logarithmic")
    if prefix == "log" and step is not None:
        raise ValueError(f"{key}: {text!r} cannot have a step, since it is logarithmic")
    if step is not None:
        if not 0 < step <= high - low:
            raise ValueError(f"{key}: the step of {text!r} must lie above 0 and fit into the range")
        # The last point of the grid; a little is added since 0.5 / 0.1 may come out below 5.
        high = low + math.floor((high - low) / step + 1e-9) * step
    return Space(key, text, "int" if prefix == "int" else "float", low, high, step, prefix == "log")
