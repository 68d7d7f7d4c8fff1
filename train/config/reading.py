"""Reading a recipe: YAML, overrides, and every fault in a sentence with the nearest valid key."""

from __future__ import annotations

import difflib
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from data_prep.storage import without_password
from train.config.credentials import redact
from train.config.recipe import Recipe
from train.config.schedule import PHASE_KINDS
from train.config.yaml_text import load_yaml

MAX_RECIPE_BYTES = 128 << 10  # read in seconds, whatever stands in it
ALTERNATIVES = ("bool", "int", "float", "str", "constrained-int")


class RecipeError(ValueError):
    """All faults of a recipe, a sentence each."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.faults = faults = [redact(fault) for fault in faults]  # they quote what was typed
        super().__init__(f"{source} has {len(faults)} fault(s):\n" + "\n".join(f"  - {f}" for f in faults))


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe, apply overrides, and check all of it.

    Args:
        path: a YAML file.
        overrides: `section.key=value`; the value is read as YAML, list members are named by ordinal
            (`schedule.phases.0.epochs=4`).

    Raises:
        RecipeError: with every fault found, each naming the nearest valid key.
    """
    tree = _read_yaml(path)
    faults = [fault for text in overrides or [] if (fault := _apply_override(tree, text))]
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        faults += [_sentence(fault) for fault in _merged(_innermost(error.errors()))]
    if faults or recipe is None:
        raise RecipeError(str(path), faults)
    return recipe


def parse_recipe(text: object) -> Recipe:
    """The recipe that `dump_recipe` wrote, from a file that may come from anybody.

    Raises:
        ValueError: it is none of this version.
    """
    if not isinstance(text, str) or len(text) > MAX_RECIPE_BYTES:
        raise ValueError("it is no text, or too long")
    try:
        return Recipe.model_validate(load_yaml(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise ValueError(f"it is no recipe of this version ({type(error).__name__})") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"resolution": 64}}` → `{"data.resolution": 64}`; lists by ordinal."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list | tuple) and any(isinstance(member, dict) for member in value):
            value = {str(position): member for position, member in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}.yaml?" if near else ""
        raise RecipeError(str(path), [f"there is no such file{hint}"])
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(str(path), [f"larger than {MAX_RECIPE_BYTES >> 10} KiB: this is no recipe"])
    try:
        # A recipe may come from anybody, and YAML tags can construct objects: none is taken.
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise RecipeError(
            str(path), [f"is no valid YAML{where}: {getattr(error, 'problem', error)}"]
        ) from None
    if not isinstance(tree, dict):
        raise RecipeError(str(path), ["is no recipe: expected sections such as data: and model:"])
    return tree


def _apply_override(tree: dict[str, Any], text: str) -> str | None:
    """Set one value in place; returns a fault or None."""
    name, equals, raw = text.partition("=")
    if not equals or not name:
        return f"override {text!r} is not of the form section.key=value"
    try:
        value = load_yaml(raw)
    except (yaml.YAMLError, ValueError):  # ValueError: what looks like a date and is none
        return f"override {text!r}: the value is no valid YAML"
    *parents, last = name.split(".")
    node: Any = tree
    for part in parents:
        node = _child(node, part)
        if node is None:
            return f"override {text!r}: there is no {part!r} to go into"
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            return f"override {text!r}: the list has {len(node)} members, counted from 0"
        node[int(last)] = value
    else:
        node[last] = value
    return None


def _child(node: Any, part: str) -> Any:
    if isinstance(node, list):
        child = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        return child if isinstance(child, dict | list) else None
    if node.get(part) is None:
        if part.isdigit():
            return None
        node[part] = {}
    child = node[part]
    return child if isinstance(child, dict | list) else None


def _innermost(faults: list[Any]) -> list[Any]:
    """Leave out faults that only follow from one inside them (a list is too short for its bad member)."""
    places = [tuple(fault["loc"]) for fault in faults]
    return [
        fault
        for fault, place in zip(faults, places, strict=True)
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]


def _merged(faults: list[Any]) -> list[Any]:
    """One fault where a value fits none of several types, in place of one a type."""
    merged: dict[tuple[Any, ...], Any] = {}
    for fault in faults:
        place = tuple(fault["loc"])
        # pydantic names the alternative that was tried as if it were a key: `bool`, `literal['auto']`.
        if place and isinstance(place[-1], str) and (place[-1] in ALTERNATIVES or "[" in place[-1]):
            place = place[:-1]
        first = merged.get(place)
        if first is None:
            merged[place] = fault | {"loc": place}
        else:
            other = fault["msg"].removeprefix("Input should be ")
            merged[place] = first | {"msg": f"{first['msg']}, or {other}"}
    return list(merged.values())


def _sentence(fault: Any) -> str:
    location = [part for part in fault["loc"] if part not in PHASE_KINDS]
    name = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        elsewhere = _sections_with(str(location[-1]))
        if near:
            hint = f"did you mean {near[0]}?"
        elif elsewhere:
            hint = f"did you mean {' or '.join(f'{section}.{location[-1]}' for section in elsewhere)}?"
        else:
            hint = f"valid here: {', '.join(valid)}"
        return f"{name}: unknown key; {hint}"
    if name == "data" and fault["type"] == "missing":
        return "data.path is missing: name the prepared folder, e.g. data.path=data/intel"
    if fault["type"] == "missing":
        example = ", e.g. data.path=data/intel" if name == "data.path" else ""
        return f"{name} is missing: set it in the recipe or on the command line{example}"
    if fault["type"] == "union_tag_invalid":
        wrong = fault["ctx"]["tag"]
        near = difflib.get_close_matches(wrong, PHASE_KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PHASE_KINDS)}"
        return f"{name}.kind: there is no {wrong!r}; {hint}"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = re.sub(r", unable to [^,]*", "", message)
    message = re.sub(r"a valid dictionary or instance of \w+", "a section of keys", message)
    given = fault.get("input")
    given = without_password(given) if isinstance(given, str) else given
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{name or 'recipe'}: {message}{shown}"


def _valid_keys(location: list[Any]) -> list[str]:
    """The keys that the section at `location` knows."""
    model: type[BaseModel] = Recipe
    for part in location:
        if part == "phases" or isinstance(part, int):
            return sorted({name for kind in PHASE_KINDS.values() for name in kind.model_fields})
        field = model.model_fields.get(str(part))
        section = _section_in(field.annotation) if field else None
        if section is None:
            return list(model.model_fields)
        model = section
    return list(model.model_fields)


def _sections_with(key: str) -> list[str]:
    """Names of the top-level sections that know `key`."""
    sections = {name: _section_in(field.annotation) for name, field in Recipe.model_fields.items()}
    return [name for name, section in sections.items() if section is not None and key in section.model_fields]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be null or stands in a mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inside = (_section_in(part) for part in typing.get_args(annotation))
    return next((section for section in inside if section is not None), None)
