"""Procrustes fit, ridge regression and representational similarity on spaces whose relation is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import procrustes as scipy_procrustes
from scipy.stats import spearmanr

from evaluation.people import ridge
from evaluation.people.procrustes import (
    correlation_intervals,
    fit_spaces,
    permuted_disparities,
    principal_components,
    procrustes,
    shuffled_rows,
)
from evaluation.people.similarity import compare_similarities, model_similarities

GROUPS = np.repeat(np.arange(12), 6)


def human_space(num_dimensions: int = 3, seed: int = 0) -> np.ndarray:
    """72 points of 12 classes: centres of different scatter a dimension, and points around them."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(12, num_dimensions)) * np.arange(num_dimensions, 0, -1)
    return centres[GROUPS] + 0.5 * generator.normal(size=(72, num_dimensions))


def rotation(size: int, seed: int = 1) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def test_a_space_turned_mirrored_scaled_and_shifted_is_the_same_space() -> None:
    human = human_space()
    features = 7 * human @ rotation(3) + [100, -3, 0]
    fit = fit_spaces(features, human, GROUPS, num_permutations=200)
    assert fit.disparity == pytest.approx(0, abs=1e-12)
    assert fit.correlations == pytest.approx([1, 1, 1])
    assert fit.held_out_correlations == pytest.approx([1, 1, 1])
    assert fit.held_out_disparity == pytest.approx(0, abs=1e-12)
    assert fit.permutation_p == pytest.approx(1 / 201)
    assert fit.within_group_p == pytest.approx(1 / 201)
    assert fit.explained_variance == pytest.approx(1)
    # In the units of the human file, so that both can be drawn over each other.
    assert fit.human == pytest.approx(human)
    assert fit.model == pytest.approx(human)
    assert fit.ridge is not None and fit.ridge.new_classes is not None
    assert min(fit.ridge.new_rows.r2) > 0.99 and min(fit.ridge.new_classes.r2) > 0.99


def test_features_that_have_nothing_to_do_with_people_look_so() -> None:
    features = np.random.default_rng(5).normal(size=(72, 40))
    fit = fit_spaces(features, human_space(), GROUPS, num_permutations=300)
    assert fit.permutation_p > 0.05 and fit.within_group_p is not None and fit.within_group_p > 0.05
    assert fit.disparity > 0.8
    assert abs(fit.held_out_mean_correlation) < 0.25 and fit.held_out_disparity > 0.95
    assert fit.ridge is not None and fit.ridge.new_rows.mean_r2 < 0.1


def test_a_fit_with_many_dimensions_flatters_inside_and_not_outside() -> None:
    generator = np.random.default_rng(2)
    fit = fit_spaces(generator.normal(size=(24, 50)), generator.normal(size=(24, 10)), num_permutations=100)
    assert fit.mean_correlation > 0.4
    assert abs(fit.held_out_mean_correlation) < 0.25
    assert fit.permutation_p > 0.05


def test_only_classes_agreeing_is_told_from_agreeing_inside_classes() -> None:
    human = human_space()
    centres = np.stack([human[group == GROUPS].mean(0) for group in range(12)])
    only_classes = centres[GROUPS] + 0.5 * np.random.default_rng(9).normal(size=human.shape)
    fit = fit_spaces(only_classes, human, GROUPS, num_permutations=300, with_ridge=False)
    assert fit.permutation_p < 0.01
    assert fit.within_group_p is not None and fit.within_group_p > 0.05
    assert fit.ridge is None


def test_disparity_is_scipys_and_a_permutation_has_the_disparity_of_its_own_fit() -> None:
    human, features = human_space(), np.random.default_rng(3).normal(size=(72, 3))
    first, second, disparity = procrustes(human, features)
    assert disparity == pytest.approx(scipy_procrustes(human, features)[2])
    found = permuted_disparities(first, second, 3, np.random.default_rng(4))
    generator = np.random.default_rng(4)
    for value in found:
        assert value == pytest.approx(scipy_procrustes(human, features[shuffled_rows(72, generator)])[2])


def test_rows_shuffled_inside_groups_stay_in_them() -> None:
    groups = np.array([2, 0, 2, 1, 0, 2])
    orders = [shuffled_rows(6, np.random.default_rng(seed), groups) for seed in range(20)]
    for order in orders:
        assert sorted(order) == list(range(6))
        assert (groups[order] == groups).all()
    assert len({tuple(order) for order in orders}) > 5


def test_three_features_fit_a_space_of_more_dimensions() -> None:
    human = human_space(5)
    scores, explained = principal_components(human[:, :2], 5)
    assert scores.shape == (72, 5) and explained == pytest.approx(1)
    assert (scores[:, 2:] == 0).all()
    assert 0 < fit_spaces(human[:, :2], human, num_permutations=100).disparity < 1


def test_intervals_over_classes_are_wider_than_over_their_samples() -> None:
    # Every sample of a class is at its class's point: there are 12 points, not 72.
    generator = np.random.default_rng(0)
    first = generator.normal(size=(12, 1))[GROUPS]
    second = first + generator.normal(size=(12, 1))[GROUPS]
    classes, samples = (
        correlation_intervals(first, second, groups, np.random.default_rng(1))[0] for groups in (GROUPS, None)
    )
    assert classes[1] - classes[0] > 1.5 * (samples[1] - samples[0])


def test_ridge_regression_is_scikit_learns() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    human, generator = human_space(), np.random.default_rng(6)
    features = np.hstack([human, generator.normal(size=(72, 100))])
    predicted = ridge._predictions(features[:50], human[:50], features[50:], np.array([0.01, 1.0]))
    for row, penalty in zip(predicted, (0.01, 1.0), strict=True):
        peer = linear_model.Ridge(alpha=penalty * 50).fit(features[:50], human[:50])
        assert row == pytest.approx(peer.predict(features[50:]))


def test_new_classes_are_harder_than_new_images_where_features_know_the_class_only() -> None:
    # A one-hot class says all of its other images and nothing of a class that was never seen.
    found = ridge.fit_ridge(np.eye(12)[GROUPS], human_space(), GROUPS)
    assert found.new_rows.mean_r2 > 0.7
    assert found.new_classes is not None and found.new_classes.mean_r2 < 0.1


def test_the_same_seed_gives_the_same_figures() -> None:
    features, human = np.random.default_rng(0).normal(size=(72, 8)), human_space()
    first, second = (fit_spaces(features, human, GROUPS, seed=3, num_permutations=100) for _ in range(2))
    assert first.held_out_correlations == second.held_out_correlations
    assert first.ridge == second.ridge and first.permutation_p == second.permutation_p


@pytest.mark.parametrize(
    ("features", "sentence"),
    [
        (np.zeros((5, 3)), "5 rows of features do not fit 72 rows"),
        (np.ones((72, 3)), "the same for all rows"),
        (np.full((72, 3), np.nan), "no finite numbers"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(features: np.ndarray, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit_spaces(features, human_space())


def test_similarities_of_equal_order_correlate_fully_and_shuffled_ones_do_not() -> None:
    points = np.random.default_rng(0).normal(size=(16, 4))
    human = model_similarities(points, "euclidean")
    groups = {"one": range(8), "other": range(8, 16)}
    same = compare_similarities(np.exp(human) * 9, human, groups, num_permutations=200)
    assert same.spearman == pytest.approx(1) and same.permutation_p == pytest.approx(1 / 201)
    assert same.within_groups == pytest.approx({"one": 1, "other": 1})
    assert same.between_groups == pytest.approx(1)
    assert same.num_pairs == 120 and same.interval is not None and same.interval[0] > 0.99
    order = np.random.default_rng(1).permutation(16)
    other = compare_similarities(human[np.ix_(order, order)], human, num_permutations=200)
    assert abs(other.spearman) < 0.3 and other.permutation_p > 0.05
    assert other.within_groups == {} and other.between_groups is None


def test_rank_correlation_is_scipys_and_the_diagonal_is_not_looked_at() -> None:
    generator = np.random.default_rng(7)
    human = generator.integers(1, 9, (10, 10)).astype(float)  # with ties, as ratings have
    human = human + human.T
    model = model_similarities(generator.normal(size=(10, 6)), "correlation")
    pairs = np.triu_indices(10, 1)
    expected = spearmanr(model[pairs], human[pairs]).statistic
    assert compare_similarities(model, human, num_permutations=100).spearman == pytest.approx(expected)
    np.fill_diagonal(human, np.nan)
    assert compare_similarities(model, human, num_permutations=100).spearman == pytest.approx(expected)


def test_measures_of_similarity() -> None:
    rows = np.array([[1.0, 2, 3], [2, 4, 6], [11, 12, 13]])
    assert model_similarities(rows, "cosine")[0, 1] == pytest.approx(1)
    assert model_similarities(rows, "cosine")[0, 2] < 0.99
    assert model_similarities(rows, "correlation")[0, 2] == pytest.approx(1)
    assert model_similarities(rows, "euclidean")[0, 1] == pytest.approx(-np.sqrt(14))
    assert np.isfinite(model_similarities(np.zeros((3, 4)), "cosine")).all()


def test_matrices_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\) do not fit human ones of shape \(5, 5\)"):
        compare_similarities(np.eye(4), np.eye(5))
