"""Which sample or class each row of a human matrix is about.

A wrong order gives figures that look like a finding, so nothing is guessed in silence: rows are matched by
the names in the file, by a list of names, or by the sorted keys, and what was done is said, with its first
and last row.

Example:
    >>> matching = match_rows(people, keys, labels, class_names, split="train")
    >>> matching.kind, matching.rule
    ('samples', '360 rows = all 360 train images, sorted by their source key, from …')
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.people.human import HumanMatrix

RowKind = Literal["samples", "classes"]


@dataclass(frozen=True)
class Matching:
    """Rows of a human matrix in terms of a split.

    Attributes:
        kind: what a row is about.
        targets: int64, shape (rows,): sample ids, or labels.
        names: of the rows: source keys, or class names.
        rule: a sentence on how they were matched.
    """

    kind: RowKind
    targets: NDArray[np.int64]
    names: tuple[str, ...]
    rule: str


def match_rows(
    people: HumanMatrix,
    keys: Sequence[str],
    class_names: Sequence[str],
    *,
    split: str,
    other_counts: dict[str, int] | None = None,
    rows: Literal["auto", "samples", "classes"] = "auto",
    sample_order: Sequence[str] | None = None,
    class_order: Sequence[str] | None = None,
) -> Matching:
    """Match rows to samples or classes.

    Args:
        keys: source key of each sample of the split, by sample id.
        other_counts: samples of the other splits, for the sentence where a matrix fits one of these.
        rows: what a row is about; `auto` tells by names or by counts.
        sample_order, class_order: names of the rows, which may be some of the samples or classes only; None:
            the names in the file, or else all of them, sorted.

    Raises:
        ValueError: the rows fit neither, or both; a name is unknown, or there twice.
    """
    kind = _kind(people, keys, class_names, split, other_counts or {}, rows, sample_order, class_order)
    order = sample_order if kind == "samples" else class_order
    names = list(keys) if kind == "samples" else list(class_names)
    noun = f"{split} images" if kind == "samples" else "classes"
    if order is not None or people.names is not None:
        listed = list(order if order is not None else people.names or ())
        if len(listed) != people.num_rows:
            raise ValueError(
                f"{people.path} has {people.num_rows:,} rows, but the list of their order has "
                f"{len(listed):,} names"
            )
        targets = _find_all(listed, names, people, noun, is_path=kind == "samples")
        by = "named by the list given" if order is not None else "named by the file itself"
    else:
        targets = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
        by = "sorted by their source key" if kind == "samples" else "sorted by their name"
    matched = tuple(names[target] for target in targets)
    share = f"all {len(names):,}" if len(matched) == len(names) else f"{len(matched):,} of {len(names):,}"
    rule = f"{people.num_rows:,} rows = {share} {noun}, {by}, from {matched[0]!r} to {matched[-1]!r}"
    return Matching(kind, targets, matched, rule)


def _kind(
    people: HumanMatrix,
    keys: Sequence[str],
    class_names: Sequence[str],
    split: str,
    other_counts: dict[str, int],
    rows: str,
    sample_order: Sequence[str] | None,
    class_order: Sequence[str] | None,
) -> RowKind:
    """What the rows are about, where that can be told; else a ValueError."""
    count = people.num_rows
    is_named = {"samples": sample_order is not None, "classes": class_order is not None}
    fits = {"samples": count == len(keys), "classes": count == len(class_names)}
    found = (
        f"{people.path} has {count:,} rows; split {split} has {len(keys):,} images and the data set "
        f"{len(class_names):,} classes"
    )
    if rows != "auto":
        kind: RowKind = "samples" if rows == "samples" else "classes"
        if not fits[kind] and not is_named[kind] and people.names is None:
            raise ValueError(
                f"{found}: a row for only some of the {kind} needs a list of their names (--order)"
            )
        return kind
    if people.names is not None and not any(is_named.values()):
        known = {_plain(name) for name in class_names}
        return "classes" if all(_plain(name) in known for name in people.names) else "samples"
    if fits["samples"] and fits["classes"]:
        raise ValueError(f"{found}: say with --rows which of the two a row is about")
    for kind in ("classes", "samples"):
        if fits[kind]:
            return kind
    for kind, order in (("samples", sample_order), ("classes", class_order)):
        if order is not None and len(order) == count:
            return kind
    if fitting := [other for other, samples in other_counts.items() if samples == count]:
        raise ValueError(
            f"{found}, so it fits neither; split {fitting[0]} has as many: add --split {fitting[0]}"
        )
    raise ValueError(
        f"{found}, so it fits neither: name the rows' images or classes in a list (--order or "
        "--class-order), or in the first column of the file"
    )


def _find_all(
    listed: Sequence[str], names: Sequence[str], people: HumanMatrix, noun: str, *, is_path: bool
) -> NDArray[np.int64]:
    """The ordinal of each listed name; a path may be given whole, as a file name, or without its ending."""
    forms = (_whole, _file_name, _stem) if is_path else (_whole, _plain)
    places: list[dict[str, list[int]]] = [{} for _ in forms]
    for ordinal, name in enumerate(names):
        for form, by_name in zip(forms, places, strict=True):
            by_name.setdefault(form(name), []).append(ordinal)
    targets = []
    for name in listed:
        # The fullest form in which there is such a name decides.
        found = next((by[form(name)] for form, by in zip(forms, places, strict=True) if form(name) in by), [])
        if len(found) > 1:
            raise ValueError(
                f"{people.path}: {name[:80]!r} fits several of the {noun}: give whole source keys"
            )
        if not found:
            known = list(places[-1])[:5000]
            near = difflib.get_close_matches(forms[-1](name), known, n=1, cutoff=0.5)
            hint = f"the nearest is {near[0]!r}" if near else f"they are called, for example, {names[0]!r}"
            raise ValueError(f"{people.path}: {name[:80]!r} is none of the {noun}; {hint}")
        targets += found
    if twice := [target for target, count in Counter(targets).items() if count > 1]:
        raise ValueError(f"{people.path}: {names[twice[0]]!r} is there twice")
    return np.array(targets, dtype=np.int64)


def _whole(name: str) -> str:
    return name


def _file_name(name: str) -> str:
    return PurePosixPath(name).name


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def groups_of(class_names: Sequence[str], min_classes: int = 4) -> dict[str, list[int]]:
    """Groups of classes that their names tell: what stands before the first "_", as in `I_Andesite`.

    {} where some class has no such part, or a group would have fewer than `min_classes`: then the part before
    the underscore is a word of a name, and no group.
    """
    groups: dict[str, list[int]] = {}
    for label, name in enumerate(class_names):
        head, underscore, rest = name.partition("_")
        if not (head and underscore and rest):
            return {}
        groups.setdefault(head, []).append(label)
    is_grouping = 2 <= len(groups) <= 20 and min(map(len, groups.values())) >= min_classes
    return groups if is_grouping else {}
