"""How well the human similarity space can be found in a network's features.

Two questions, from the weaker to the stronger. Procrustes analysis (Gower, 1975; `scipy.spatial.procrustes`):
are the two spaces the same but for shift, rotation, reflection and one scale? It needs as many features as
human dimensions, so features are reduced by PCA first: directions of large variance, whether people use them
or not. Ridge regression with cross-validation: can each human dimension be read from the features by a
weighted sum (as Sanders and Nosofsky, 2020, and Peterson, Abbott and Griffiths, 2018, ask in similar form)?

A fit always flatters on the points that it was made on. So all is stated for points outside the fit as well,
and where rows are samples, whole classes are left out.

Example:
    >>> fit = fit_spaces(features, human, groups=labels)
    >>> fit.disparity, fit.permutation_p, fit.held_out_mean_correlation
    (0.61, 0.001, 0.48)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.people.ridge import RidgeFit, fit_ridge

Array = NDArray[np.float64]
NUM_RESAMPLES = 1_000
NUM_SPLITS = 20  # random halves of the held-out fit


@dataclass(frozen=True)
class SpaceFit:
    """A set of features beside a human space of D dimensions.

    Attributes:
        disparity: sum of squared differences after the fit, both spaces scaled to a sum of squares of 1; 0 is
            equal, 1 is nothing in common.
        permutation_p: (1 + permutations with a disparity as low) / (1 + permutations), rows shuffled.
        permuted_disparity: the mean of these.
        within_group_p: the same with rows shuffled inside their groups only: whether differences within a
            class agree, too. None where rows are no samples of classes.
        correlations: Pearson's r of each human dimension with the fitted features, with 95% bootstrap
            intervals of which groups (or rows) there are, the fit held fixed.
        held_out_correlations: the same on points outside the fit: mean over random halves of the groups.
        held_out_disparity: squared error over variance, there; above 1 is worse than the mean.
        explained_variance: of the features by their first D principal components, a fraction.
        human, model: the two spaces after the fit, (rows, D), in units of `human`'s overall scale.
    """

    num_rows: int
    num_features: int
    num_dimensions: int
    explained_variance: float
    disparity: float
    permutation_p: float
    permuted_disparity: float
    within_group_p: float | None
    correlations: list[float]
    correlation_intervals: list[tuple[float, float]]
    mean_correlation: float
    held_out_correlations: list[float]
    held_out_mean_correlation: float
    held_out_disparity: float
    ridge: RidgeFit | None
    human: Array
    model: Array


def fit_spaces(
    features: Array,
    human: Array,
    groups: NDArray[np.int64] | None = None,
    *,
    seed: int = 0,
    num_permutations: int = NUM_RESAMPLES,
    with_ridge: bool = True,
) -> SpaceFit:
    """All of `SpaceFit` for features (rows, F) and a human space (rows, D) of the same rows.

    Args:
        groups: shape (rows,): the class of each row where rows are samples, else None.

    Raises:
        ValueError: other numbers of rows, or features that are the same for all rows.
    """
    features, human = np.asarray(features, np.float64), np.asarray(human, np.float64)
    if len(features) != len(human):
        raise ValueError(
            f"{len(features):,} rows of features do not fit {len(human):,} rows of human coordinates"
        )
    if not np.isfinite(features).all():
        raise ValueError("the features hold values that are no finite numbers")
    if np.allclose(features, features[0]):
        raise ValueError("the features are the same for all rows: there is nothing to compare")
    num_features = features.shape[1]
    features = rotated(features)
    generator = np.random.default_rng(seed)
    scores, explained = principal_components(features, human.shape[1])
    fitted_human, fitted_model, disparity = procrustes(human, scores)
    permuted = permuted_disparities(fitted_human, fitted_model, num_permutations, generator)
    is_grouped = groups is not None and np.bincount(groups).max() >= 3
    within_p = None
    if is_grouped:
        within = permuted_disparities(fitted_human, fitted_model, num_permutations, generator, groups)
        within_p = p_value(disparity, within)
    correlations = column_correlations(fitted_human, fitted_model)
    held_out, held_out_disparity = held_out_fit(features, human, groups, generator)
    # In the units of the human file, which is what its reader knows.
    scale = float(np.linalg.norm(human - human.mean(0)))
    return SpaceFit(
        num_rows=len(human),
        num_features=num_features,
        num_dimensions=human.shape[1],
        explained_variance=explained,
        disparity=disparity,
        permutation_p=p_value(disparity, permuted),
        permuted_disparity=float(permuted.mean()),
        within_group_p=within_p,
        correlations=correlations.tolist(),
        correlation_intervals=correlation_intervals(fitted_human, fitted_model, groups, generator),
        mean_correlation=float(correlations.mean()),
        held_out_correlations=held_out.tolist(),
        held_out_mean_correlation=float(held_out.mean()),
        held_out_disparity=held_out_disparity,
        ridge=fit_ridge(features, human, groups, seed) if with_ridge else None,
        human=fitted_human * scale + human.mean(0),
        model=fitted_model * scale + human.mean(0),
    )


def rotated(features: Array) -> Array:
    """The features, centred and turned into as few columns as there are rows at most.

    PCA, Procrustes analysis and ridge regression depend on products of rows only, which a rotation leaves as
    they
    are: nothing of rows that are left out later gets into a fit, and a hundred thousand features cost no more
    than the rows do.
    """
    centred = features - features.mean(0)
    if centred.shape[1] <= len(centred):
        return centred
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    return left * values


def principal_components(features: Array, num_components: int) -> tuple[Array, float]:
    """Scores on the first components, (rows, num_components), and the fraction of variance they hold.

    Where there are fewer components than that (three features, say), the rest is zeros.
    """
    centred = features - features.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    scores = np.zeros((len(features), num_components))
    kept = min(num_components, len(values))
    scores[:, :kept] = left[:, :kept] * values[:kept]
    return scores, float((values[:kept] ** 2).sum() / (values**2).sum())


def procrustes(human: Array, model: Array) -> tuple[Array, Array, float]:
    """Both spaces centred and of sum of squares 1, the model's fitted onto the human; disparity."""
    from scipy.spatial import procrustes as scipy_procrustes

    return scipy_procrustes(human, model)


def permuted_disparities(
    human: Array,
    model: Array,
    num_permutations: int,
    generator: np.random.Generator,
    groups: NDArray[np.int64] | None = None,
) -> Array:
    """Disparities after shuffling the model's rows, all of them or inside `groups`: shape
    (num_permutations,).

    Both spaces as `procrustes` returns them. The best fit of standardised spaces has disparity 1 − (sum of
    the singular values of AᵀB)², so no permutation needs a fit of its own.
    """
    unit = model / np.linalg.norm(model)
    disparities = np.empty(num_permutations)
    for number in range(num_permutations):
        order = shuffled_rows(len(human), generator, groups)
        values = np.linalg.svd(human.T @ unit[order], compute_uv=False)
        disparities[number] = 1 - values.sum() ** 2
    return disparities


def shuffled_rows(
    num_rows: int, generator: np.random.Generator, groups: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """A permutation of the rows; with groups, one that leaves every row in its group."""
    if groups is None:
        return generator.permutation(num_rows)
    order = np.empty(num_rows, dtype=np.int64)
    # Sorted by (group, random) and by (group, place): the rows of a group in a random order, in their places.
    order[np.lexsort((np.arange(num_rows), groups))] = np.lexsort((generator.random(num_rows), groups))
    return order


def p_value(observed: float, permuted: Array) -> float:
    """(1 + permutations as low as observed) / (1 + permutations): never 0 (Phipson and Smyth, 2010)."""
    return float((1 + (permuted <= observed + 1e-12).sum()) / (1 + len(permuted)))


def column_correlations(first: Array, second: Array) -> Array:
    """Pearson's r of each column with its counterpart: shape (columns,); 0 where a column is constant."""
    first, second = first - first.mean(0), second - second.mean(0)
    norms = np.linalg.norm(first, axis=0) * np.linalg.norm(second, axis=0)
    products = (first * second).sum(0)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 1e-12)


def correlation_intervals(
    first: Array, second: Array, groups: NDArray[np.int64] | None, generator: np.random.Generator
) -> list[tuple[float, float]]:
    """95% percentile bootstrap intervals of `column_correlations`; whole groups are drawn where there are
    some.

    Samples of one class are alike, so drawing them one by one would give intervals that are too narrow.
    """
    units = [np.flatnonzero(groups == group) for group in np.unique(groups)] if groups is not None else []
    if len(units) < 8:
        units = [np.array([row]) for row in range(len(first))]
    drawn = np.empty((NUM_RESAMPLES, first.shape[1]))
    for number in range(NUM_RESAMPLES):
        rows = np.concatenate([units[unit] for unit in generator.integers(0, len(units), len(units))])
        drawn[number] = column_correlations(first[rows], second[rows])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def held_out_fit(
    features: Array, human: Array, groups: NDArray[np.int64] | None, generator: np.random.Generator
) -> tuple[Array, float]:
    """The Procrustes fit made on one half and judged on the other, over random halves and both directions.

    Halves are of groups (classes) where there are at least four, else of rows. PCA, shift, rotation and scale
    all come from the first half.

    Returns:
        Mean correlation of each dimension, (D,); squared error over the variance around the first half's
        mean.
    """
    units = np.arange(len(human)) if groups is None or len(np.unique(groups)) < 4 else groups
    names = np.unique(units)
    correlations, error, variance = [], 0.0, 0.0
    for _ in range(NUM_SPLITS):
        chosen = np.isin(units, generator.permutation(names)[: len(names) // 2])
        for half in (chosen, ~chosen):
            predicted = _fit_and_predict(features[half], human[half], features[~half])
            correlations.append(column_correlations(human[~half], predicted))
            error += float(((human[~half] - predicted) ** 2).sum())
            variance += float(((human[~half] - human[half].mean(0)) ** 2).sum())
    return np.mean(correlations, axis=0), error / variance


def _fit_and_predict(features: Array, human: Array, new_features: Array) -> Array:
    mean, human_mean = features.mean(0), human.mean(0)
    _, _, directions = np.linalg.svd(features - mean, full_matrices=False)
    directions = directions[: human.shape[1]]
    scores = (features - mean) @ directions.T
    left, values, right = np.linalg.svd(scores.T @ (human - human_mean), full_matrices=False)
    size = float((scores**2).sum())
    scale = values.sum() / size if size > 0 else 0.0
    return scale * ((new_features - mean) @ directions.T) @ (left @ right) + human_mean
