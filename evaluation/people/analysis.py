"""All measures of one set of features, for the trained network and for what it is compared with.

The same figures are taken of the same architecture with random weights, of mean colour and of 8×8-pixel
thumbnails: what these reach, training has not brought.

Example:
    >>> question = Question(coordinates, judgments, labels, class_names, measure="correlation")
    >>> measure_features("layer4", features, question).similarity.spearman
    0.41
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.people.features import class_means
from evaluation.people.human import MAX_COMPARED
from evaluation.people.matching import Matching, groups_of
from evaluation.people.procrustes import SpaceFit, fit_spaces
from evaluation.people.similarity import (
    Measure,
    SimilarityFit,
    compare_similarities,
    model_similarities,
    rank_correlation,
)

Array = NDArray[np.float64]
NUM_CHECKS = 500
JUDGMENTS, DISTANCES = "judged similarities", "distances in the human space"


@dataclass(frozen=True)
class HumanSide:
    """One human matrix, with what its rows are about."""

    values: Array
    matching: Matching


@dataclass(frozen=True)
class Question:
    """What features are compared with.

    Attributes:
        coordinates: the human space, or None. judgments: similarities, larger is more alike, or None.
        labels: of the split's samples, int64.
        measure: how similar a network finds two rows.
        num_permutations: of every test.
    """

    coordinates: HumanSide | None
    judgments: HumanSide | None
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    measure: Measure = "correlation"
    num_permutations: int = 1_000
    seed: int = 0

    @property
    def compared(self) -> tuple[Array, Matching, str] | None:
        """Human similarities, what their rows are, and where they come from; None where there are none.

        Without judgments they are the negative distances in the human space, of class means where rows are
        samples.
        """
        if self.judgments is not None:
            return self.judgments.values, self.judgments.matching, JUDGMENTS
        if self.coordinates is None:
            return None
        values, matching = self.coordinates.values, self.coordinates.matching
        if matching.kind == "samples":
            present, ordinals = np.unique(self.labels[matching.targets], return_inverse=True)
            if len(present) < 4:
                return None
            values = np.stack([values[ordinals == ordinal].mean(0) for ordinal in range(len(present))])
            names = tuple(self.class_names[label] for label in present)
            matching = Matching("classes", present, names, "the mean of each class's rows")
        if len(values) > MAX_COMPARED:
            return None
        return model_similarities(values, "euclidean"), matching, DISTANCES


@dataclass(frozen=True)
class Measured:
    """One set of features beside people; None for what there is no human matrix for.

    `similarities` are the features' own, in the order of the human ones.
    """

    name: str
    space: SpaceFit | None
    similarity: SimilarityFit | None
    similarities: Array | None


def measure_features(
    name: str,
    features: NDArray[np.float32],
    question: Question,
    *,
    measure: Measure | None = None,
    with_ridge: bool = True,
) -> Measured:
    """All measures of features by sample id, (samples, F).

    Args:
        measure: of similarity, in place of the question's.

    Raises:
        ValueError: the features are the same for all rows, or a class has no sample.
    """
    space = None
    if question.coordinates is not None:
        matching = question.coordinates.matching
        space = fit_spaces(
            rows_of(features, matching, question),
            question.coordinates.values,
            question.labels[matching.targets] if matching.kind == "samples" else None,
            seed=question.seed,
            num_permutations=question.num_permutations,
            with_ridge=with_ridge,
        )
    similarity, similarities = None, None
    if (compared := question.compared) is not None:
        human, matching, _ = compared
        similarities = model_similarities(rows_of(features, matching, question), measure or question.measure)
        similarity = compare_similarities(
            similarities,
            human,
            row_groups(matching, question),
            seed=question.seed,
            num_permutations=question.num_permutations,
        )
    return Measured(name, space, similarity, similarities)


def rows_of(features: NDArray[np.float32], matching: Matching, question: Question) -> Array:
    """Features in the order of a human matrix's rows: of samples, or means of classes."""
    if matching.kind == "samples":
        return features[matching.targets].astype(np.float64)
    return class_means(features, question.labels, matching.targets, question.class_names)


def row_groups(matching: Matching, question: Question) -> Mapping[str, Sequence[int]] | None:
    """Groups of rows by the names of their classes, where these tell any."""
    labels = matching.targets if matching.kind == "classes" else question.labels[matching.targets]
    by_label = {label: name for name, members in groups_of(question.class_names).items() for label in members}
    groups: dict[str, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        if label in by_label:
            groups.setdefault(by_label[label], []).append(row)
    return groups if len(groups) > 1 else None


@dataclass(frozen=True)
class OrderCheck:
    """Evidence on whether rows were matched rightly; `fault` is a sentence where they seem not to be."""

    sentence: str
    fault: str | None


def check_order(question: Question) -> list[OrderCheck]:
    """What the human data themselves say of the order of their rows.

    Rows of one class should be nearer to each other than to others, and two human matrices of the same
    classes should agree: in a wrong order neither holds.
    """
    checks = []
    generator = np.random.default_rng(question.seed)
    side = question.coordinates
    if side is not None and side.matching.kind == "samples":
        labels = question.labels[side.matching.targets]
        if 1 < len(np.unique(labels)) < len(labels):
            checks.append(_check_classes(side.values, labels, generator))
    if side is not None and question.judgments is not None:
        spaces_only = Question(side, None, question.labels, question.class_names)
        derived = spaces_only.compared
        if derived is not None and derived[1].kind == question.judgments.matching.kind:
            checks += _check_agreement(derived, question.judgments)
    return checks


def _check_classes(values: Array, labels: NDArray[np.int64], generator: np.random.Generator) -> OrderCheck:
    """Scatter around class means as a share of all scatter, against shuffled rows."""
    centred = values - values.mean(0)
    total = float((centred**2).sum())

    def share(order: NDArray[np.int64]) -> float:
        _, ordinals = np.unique(labels[order], return_inverse=True)
        sums = np.zeros((ordinals.max() + 1, values.shape[1]))
        np.add.at(sums, ordinals, centred)
        return 1 - float((sums**2 / np.bincount(ordinals)[:, None]).sum()) / total

    observed = share(np.arange(len(labels)))
    shuffled = np.array([share(generator.permutation(len(labels))) for _ in range(NUM_CHECKS)])
    sentence = (
        f"In the human space, {observed:.0%} of the variance lies inside classes; with the rows shuffled it "
        f"is {shuffled.mean():.0%}."
    )
    if (shuffled <= observed).mean() > 0.01:
        return OrderCheck(
            sentence,
            "Images of one class are no nearer to each other in the human space than any others: the order "
            "of the rows is probably wrong.",
        )
    return OrderCheck(sentence, None)


def _check_agreement(derived: tuple[Array, Matching, str], judgments: HumanSide) -> list[OrderCheck]:
    values, matching, _ = derived
    place = {target: row for row, target in enumerate(matching.targets.tolist())}
    shared = [(place[t], row) for row, t in enumerate(judgments.matching.targets.tolist()) if t in place]
    if len(shared) < 8:  # of so few pairs a correlation says nothing
        return []
    ours, theirs = (np.array(rows) for rows in zip(*shared, strict=True))
    first, second = np.triu_indices(len(shared), 1)
    near, judged = values[ours[first], ours[second]], judgments.values[theirs[first], theirs[second]]
    found = rank_correlation(near, judged)
    sentence = (
        f"Distances in the human space and judged similarities of {len(shared)} rows agree: ρ = {found:.2f}."
    )
    fault = "The human space and the judged similarities do not agree: the order of one is probably wrong."
    return [OrderCheck(sentence, fault if found < 0.2 else None)]
