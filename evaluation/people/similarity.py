"""Do the network and people find the same things alike? Representational similarity analysis.

Kriegeskorte, Mur and Bandettini (2008): the similarity of every pair of classes by the network, and by
people; Spearman's rank correlation of the two lists of pairs. Pairs share classes, so they are not
independent: the p value is of a Mantel test, which shuffles classes (Mantel, 1967), and the interval of a
bootstrap over classes (Nili et al., 2014).

Example:
    >>> compare_similarities(model_similarities(class_means, "correlation"), judgments).spearman
    0.41
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Measure = Literal["correlation", "cosine", "euclidean"]
NUM_RESAMPLES = 1_000
BOOTSTRAPPED = range(8, 301)  # rows: of fewer there is nothing to draw from, of more it takes minutes
MIN_PAIRS = 6


@dataclass(frozen=True)
class SimilarityFit:
    """Similarities of a network beside those of people.

    Attributes:
        spearman: over all pairs of different rows.
        interval: 95%, bootstrap over rows; None for fewer than 8 rows and more than 300.
        permutation_p: one-sided Mantel test: (1 + permutations as high) / (1 + permutations).
        within_groups: group → Spearman over the pairs inside it.
        between_groups: over pairs of different groups; None without groups.
    """

    spearman: float
    interval: tuple[float, float] | None
    permutation_p: float
    num_rows: int
    num_pairs: int
    within_groups: dict[str, float]
    between_groups: float | None


def model_similarities(features: Array, measure: Measure) -> Array:
    """Similarities of all rows of `features` (rows, F): (rows, rows), larger is more alike.

    `correlation` and `cosine` of the two rows; `euclidean` is their negative distance.
    """
    from scipy.spatial.distance import pdist, squareform

    features = np.asarray(features, np.float64)
    if measure == "euclidean":
        return -squareform(pdist(features))
    rows = features - features.mean(1, keepdims=True) if measure == "correlation" else features
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12)
    return rows @ rows.T


def compare_similarities(
    model: Array,
    human: Array,
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    seed: int = 0,
    num_permutations: int = NUM_RESAMPLES,
) -> SimilarityFit:
    """All of `SimilarityFit` for two matrices (rows, rows) of the same rows; diagonals are not looked at.

    Args:
        groups: name → ordinals of its rows; pairs inside and between groups are stated one by one, too.

    Raises:
        ValueError: the matrices are of different sizes.
    """
    if model.shape != human.shape or model.ndim != 2 or model.shape[0] != model.shape[1]:
        raise ValueError(f"similarities of shape {model.shape} do not fit human ones of shape {human.shape}")
    generator = np.random.default_rng(seed)
    num_rows = len(model)
    first, second = np.triu_indices(num_rows, 1)
    spearman = rank_correlation(model[first, second], human[first, second])
    permuted = _permuted(model, human, num_permutations, generator)
    within, between = {}, None
    if groups:
        group_of = np.full(num_rows, -1)
        for number, (name, members) in enumerate(groups.items()):
            group_of[list(members)] = number
            inside = (group_of[first] == number) & (group_of[second] == number)
            if inside.sum() >= MIN_PAIRS:
                within[name] = rank_correlation(model[first, second][inside], human[first, second][inside])
        apart = group_of[first] != group_of[second]
        if apart.sum() >= MIN_PAIRS:
            between = rank_correlation(model[first, second][apart], human[first, second][apart])
    return SimilarityFit(
        spearman=spearman,
        interval=_interval(model, human, generator) if num_rows in BOOTSTRAPPED else None,
        permutation_p=float((1 + (permuted >= spearman - 1e-12).sum()) / (1 + num_permutations)),
        num_rows=num_rows,
        num_pairs=len(first),
        within_groups=within,
        between_groups=between,
    )


def rank_correlation(first: Array, second: Array) -> float:
    """Spearman's rank correlation, ties averaged; 0 where one of the two is constant."""
    return float(_unit_ranks(first) @ _unit_ranks(second))


def _unit_ranks(values: Array) -> Array:
    """Ranks, centred and of norm 1; zeros for constant values."""
    from scipy.stats import rankdata

    ranks = rankdata(values)
    ranks -= ranks.mean()
    norm = np.linalg.norm(ranks)
    return ranks / norm if norm > 0 else ranks


def _permuted(model: Array, human: Array, num_permutations: int, generator: np.random.Generator) -> Array:
    """Rank correlations with the rows of `model` shuffled: the ranks stay, only their places change."""
    first, second = np.triu_indices(len(model), 1)
    ranks = np.zeros(model.shape)
    ranks[first, second] = _unit_ranks(model[first, second])
    ranks += ranks.T
    target = _unit_ranks(human[first, second])
    found = np.empty(num_permutations)
    for number in range(num_permutations):
        order = generator.permutation(len(model))
        found[number] = ranks[order[first], order[second]] @ target
    return found


def _interval(model: Array, human: Array, generator: np.random.Generator) -> tuple[float, float]:
    num_rows = len(model)
    first, second = np.triu_indices(num_rows, 1)
    drawn = np.empty(NUM_RESAMPLES)
    for number in range(NUM_RESAMPLES):
        rows = generator.integers(0, num_rows, num_rows)
        rows_a, rows_b = rows[first], rows[second]
        apart = rows_a != rows_b  # a class drawn twice is no pair
        drawn[number] = rank_correlation(model[rows_a, rows_b][apart], human[rows_a, rows_b][apart])
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
