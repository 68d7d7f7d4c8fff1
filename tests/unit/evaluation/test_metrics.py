import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from evaluation.metrics import (
    Predictions,
    confusion_matrix,
    distinct_names,
    evaluate,
    finite_number,
    most_confused_pairs,
    per_class_table,
    softmax,
    topk_accuracy,
    wilson_interval,
)


def make_predictions(logits, labels, class_names=None):
    logits = np.asarray(logits, dtype=np.float32)
    names = class_names or tuple(f"class {label}" for label in range(logits.shape[1]))
    return Predictions(logits, np.asarray(labels), np.arange(len(labels)), names)


def random_predictions(num_samples, num_classes, seed=0, *, levels=None):
    """With `levels`, logits take only so many values, so that most samples have ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_samples, num_classes))
    if levels:
        logits = rng.integers(0, levels, size=(num_samples, num_classes))
    return make_predictions(logits, rng.integers(0, num_classes, size=num_samples))


def counted_topk(predictions, k):
    """Sort every row by hand: by logit, and of equal logits the lower label first."""
    hits = 0
    for row, label in zip(predictions.logits, predictions.labels, strict=True):
        ranking = sorted(range(len(row)), key=lambda candidate: (-row[candidate], candidate))
        hits += label in ranking[:k]
    return hits / len(predictions.labels)


@pytest.mark.parametrize("levels", [None, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 5, 7, 8, 50])
def test_topk_equals_a_count_by_hand(k, levels):
    predictions = random_predictions(200, 8, levels=levels)
    assert topk_accuracy(predictions, k) == counted_topk(predictions, k)


def test_equal_logits_are_no_free_hits():
    # A model that says the same of every class knows one class in four, not four of four.
    predictions = make_predictions(np.zeros((4, 4)), [0, 1, 2, 3])
    assert [topk_accuracy(predictions, k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_top1_agrees_with_the_confusion_matrix_where_logits_tie():
    predictions = random_predictions(500, 6, levels=2)
    assert topk_accuracy(predictions, 1) == confusion_matrix(predictions).trace() / 500


def test_topk_refuses_k_zero():
    with pytest.raises(ValueError, match="at least 1"):
        topk_accuracy(random_predictions(3, 3), 0)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # The roots of (p - x)² = z² x (1 - x) / n, found by bisection with 50 decimal digits.
    [
        (10, 20, 0.299298, 0.700702),
        (1, 10, 0.017876, 0.404150),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (38155, 50000, 0.759353, 0.766807),
    ],
)
def test_wilson_interval_has_the_known_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-6)


def test_wilson_interval_stays_within_the_unit_interval_and_around_the_fraction():
    for n in (1, 2, 3, 7, 50, 1000):
        for successes in range(n + 1):
            low, high = wilson_interval(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
    assert wilson_interval(0, 7)[0] == 0 and wilson_interval(7, 7)[1] == 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_confusion_matrix_has_true_labels_in_rows():
    predictions = make_predictions(np.eye(3)[[1, 1, 2, 0]], [0, 0, 2, 2])
    matrix = confusion_matrix(predictions)
    assert matrix.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 1]]
    assert matrix.dtype == np.int64


def test_confusion_matrix_counts_every_sample_once():
    predictions = random_predictions(777, 11)
    matrix = confusion_matrix(predictions)
    assert matrix.sum() == 777
    assert matrix.sum(axis=1).tolist() == np.bincount(predictions.labels, minlength=11).tolist()
    assert (
        matrix.sum(axis=0).tolist() == np.bincount(predictions.logits.argmax(axis=1), minlength=11).tolist()
    )


def test_per_class_table_agrees_with_the_samples_of_each_class():
    predictions = random_predictions(400, 9)
    for row in per_class_table(predictions):
        own = predictions.labels == row.label
        part = make_predictions(predictions.logits[own], predictions.labels[own])
        assert row.count == own.sum()
        assert row.top1 == topk_accuracy(part, 1)
        assert row.top5 == topk_accuracy(part, 5)
        assert row.top1_interval == wilson_interval(round(row.top1 * row.count), row.count)


def test_most_common_error_is_counted_without_the_right_answers():
    # Class 0: three right, two taken for 2, one for 1. Class 1: never wrong. Class 2: one each for 0 and 1.
    predictions = make_predictions(
        np.eye(3)[[0, 0, 0, 2, 2, 1, 1, 0, 1]], [0, 0, 0, 0, 0, 0, 1, 2, 2], ("a", "b", "c")
    )
    errors = [(row.most_common_error, row.most_common_error_count) for row in per_class_table(predictions)]
    assert errors == [(2, 2), (None, 0), (0, 1)]


def test_a_class_without_samples_has_none_and_no_nan():
    table = per_class_table(make_predictions(np.eye(3)[[0, 2]], [0, 2]))
    assert table[1].count == 0
    assert (table[1].top1, table[1].top5, table[1].top1_interval, table[1].most_common_error) == (None,) * 4
    json.dumps([asdict(row) for row in table], allow_nan=False)


def test_a_class_that_is_always_wrong_has_zero_and_a_width():
    table = per_class_table(make_predictions(np.eye(2)[[1, 1, 1]], [0, 0, 0]))
    assert table[0].top1 == 0
    assert table[0].top1_interval[0] == 0 and table[0].top1_interval[1] > 0.5
    assert (table[0].most_common_error, table[0].most_common_error_count) == (1, 3)


def test_most_confused_pairs_are_directed_largest_first_and_never_right_answers():
    matrix = np.array([[90, 7, 0], [2, 50, 3], [7, 0, 10]])
    pairs = [(pair.true_label, pair.predicted_label, pair.count) for pair in most_confused_pairs(matrix, 10)]
    # 2 → 0 comes before 0 → 1: as many, but a larger share of its class.
    assert pairs == [(2, 0, 7), (0, 1, 7), (1, 2, 3), (1, 0, 2)]
    assert most_confused_pairs(matrix, 1)[0].fraction == pytest.approx(7 / 17)
    assert len(most_confused_pairs(matrix, 2)) == 2
    assert most_confused_pairs(np.diag([3, 0]), 5) == []


@pytest.mark.parametrize(("matrix", "limit"), [(np.zeros((2, 3)), 1), (np.zeros((2, 2)), -1)])
def test_most_confused_pairs_refuses_what_it_cannot_order(matrix, limit):
    with pytest.raises(ValueError):
        most_confused_pairs(matrix, limit)


def test_softmax_survives_large_logits_and_keeps_ratios():
    probabilities = softmax(np.array([[1000.0, 1000.0 + math.log(3)], [-1e30, 0.0]]))
    assert probabilities == pytest.approx(np.array([[0.25, 0.75], [0.0, 1.0]]), abs=1e-4)
    assert probabilities.dtype == np.float32
    assert softmax(np.zeros(4)) == pytest.approx(np.full(4, 0.25))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros(3)}, "shape"),
        ({"logits": np.zeros((0, 3)), "labels": np.zeros(0, int), "sample_ids": np.zeros(0, int)}, "empty"),
        ({"labels": np.array([0, 1])}, "labels must have the shape"),
        ({"sample_ids": np.array([[0, 1, 2]])}, "sample_ids must have the shape"),
        ({"class_names": ("a", "b")}, "2 class names for 3"),
        ({"labels": np.array([0, 1, 3])}, "Label 3 has no class"),
        ({"labels": np.array([0, -1, 2])}, "Label -1 has no class"),
        ({"labels": np.array([0.0, 1.0, 2.0])}, "integers"),
        ({"sample_ids": np.array([4, 5, 4])}, "Sample 4 comes more than once"),
        ({"logits": np.array([[0, 0, 0], [0, np.nan, 0], [np.inf, 0, 0]])}, "2 of 3 samples are not finite"),
    ],
)
def test_predictions_refuse_what_cannot_be_counted(change, message):
    fields = {
        "logits": np.zeros((3, 3)),
        "labels": np.array([0, 1, 2]),
        "sample_ids": np.array([0, 1, 2]),
        "class_names": ("a", "b", "c"),
    }
    Predictions(**fields)
    with pytest.raises(ValueError, match=message):
        Predictions(**{**fields, **change})


def test_predictions_of_half_precision_and_small_integers_are_converted():
    predictions = Predictions(
        np.zeros((2, 2), np.float16), np.array([0, 1], np.uint8), np.array([7, 8], np.int32), ["a", "b"]
    )
    assert (predictions.logits.dtype, predictions.labels.dtype) == (np.float32, np.int64)
    assert predictions.class_names == ("a", "b")


def test_names_that_occur_twice_are_told_apart():
    assert distinct_names(["crane", "dog", "crane"]) == ["crane (0)", "dog", "crane (2)"]


@pytest.mark.parametrize("value", [None, "0.5", True, math.nan, math.inf, [1.0]])
def test_only_finite_numbers_are_numbers(value):
    assert finite_number(value) is None
    assert finite_number(3) == 3.0


def test_evaluate_agrees_with_its_parts():
    predictions = random_predictions(300, 12)
    results = evaluate(predictions, num_pairs=4)
    assert results.top1 == topk_accuracy(predictions, 1) == results.confusion.trace() / 300
    assert results.top5 == topk_accuracy(predictions, 5) > results.top1
    assert results.top1_interval == wilson_interval(round(results.top1 * 300), 300)
    assert results.top5_interval == wilson_interval(round(results.top5 * 300), 300)
    assert results.most_confused == most_confused_pairs(results.confusion, 4)


def test_precision_and_f1_agree_with_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 4, 200)  # class 4 is never predicted
    names = tuple("abcdef")  # class 5 has no sample
    results = evaluate(Predictions(np.eye(6)[predicted], labels, np.arange(200), names))
    expected = sklearn_metrics.precision_recall_fscore_support(labels, predicted, zero_division=0)
    for row, precision, recall, f1 in zip(results.table, *expected[:3], strict=False):
        assert (row.precision or 0, row.top1, row.f1) == pytest.approx((precision, recall, f1))
    assert results.table[4].precision is None and results.table[4].f1 == 0
    assert results.table[5].precision is None and results.table[5].f1 is None
    assert results.macro_precision == pytest.approx(expected[0].mean())
    assert results.macro_recall == pytest.approx(expected[1].mean())
    assert results.macro_f1 == pytest.approx(expected[2].mean())
