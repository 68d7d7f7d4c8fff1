import numpy as np
import pytest

from evaluation.metrics import wilson_interval
from evaluation.robustness.corruptions import corrupt
from evaluation.robustness.measure import (
    corrupted_examples,
    measure_robustness,
    parse_severities,
    stratified_sample,
)


@pytest.fixture
def dark_and_light():
    """120 plain images of two classes, below and above middle grey, and a classifier of their brightness."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    values = np.where(labels == 1, rng.integers(150, 250, 120), rng.integers(5, 100, 120))
    images = np.broadcast_to(values[:, None, None, None], (120, 16, 16, 3)).astype(np.uint8)

    def classify(batch):
        return (batch.mean(axis=(1, 2, 3)) > 127.5).astype(np.int64)

    return images, labels, 1000 + np.arange(120), classify


def test_accuracies_are_those_of_the_corrupted_images(dark_and_light):
    images, labels, ids, classify = dark_and_light
    result = measure_robustness(
        images, labels, ids, classify, ["contrast", "brightness"], severities=(5, 1), seed=4, progress=False
    )
    assert result.clean_top1 == 1 and result.severities == (1, 5) and result.num_in_split == 120
    assert [(cell.kind, cell.severity) for cell in result.cells] == [
        ("contrast", 1),
        ("contrast", 5),
        ("brightness", 1),
        ("brightness", 5),
    ]
    for cell in result.cells:
        expected = int((classify(corrupt(images, cell.kind, cell.severity, 4, ids)) == labels).sum())
        assert cell.num_correct == expected and cell.top1 == expected / 120
        assert cell.top1_interval == wilson_interval(expected, 120)
    # Less contrast leaves the mean; a raised brightness makes the dark class light.
    assert result.kind_mean("contrast") == 1
    assert result.cells[3].top1 < 0.6
    assert result.mean_top1 == pytest.approx(np.mean([cell.top1 for cell in result.cells]))
    assert result.relative == pytest.approx(result.mean_top1)
    assert result.group_means() == {
        "digital": result.kind_mean("contrast"),
        "weather": result.kind_mean("brightness"),
    }


def test_threads_and_their_number_change_nothing(dark_and_light):
    images, labels, ids, classify = dark_and_light
    results = [
        measure_robustness(
            images,
            labels,
            ids,
            classify,
            ["gaussian_noise", "brightness"],
            num_workers=num_workers,
            progress=False,
        )
        for num_workers in (1, 3)
    ]
    assert results[0] == results[1]


def test_a_model_that_is_always_wrong_has_no_relative_robustness(dark_and_light):
    images, labels, ids, classify = dark_and_light
    result = measure_robustness(
        images, labels, ids, lambda batch: 1 - classify(batch), ["contrast"], severities=(1,), progress=False
    )
    assert result.clean_top1 == 0 and result.relative is None
    assert result.as_fields()["relative"] is None


def test_an_error_in_the_model_ends_it(dark_and_light):
    images, labels, ids, classify = dark_and_light
    calls = []

    def failing(batch):
        calls.append(len(batch))
        if len(calls) > 4:
            raise RuntimeError("out of memory")
        return classify(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_robustness(images, labels, ids, failing, ["contrast", "brightness"], progress=False)


def test_nothing_to_measure_is_a_sentence(dark_and_light):
    images, labels, ids, classify = dark_and_light
    with pytest.raises(ValueError, match="at least"):
        measure_robustness(images, labels, ids, classify, [], progress=False)


def test_examples_show_one_image_that_is_right_when_clean(dark_and_light):
    images, labels, ids, classify = dark_and_light
    examples = corrupted_examples(
        images, labels, ids, classify, ["brightness", "contrast"], severity=5, seed=2
    )
    assert [example.kind for example in examples] == ["", "brightness", "contrast"]
    clean = examples[0]
    assert clean.predicted_label == clean.label and any((image == clean.image).all() for image in images)
    assert len({example.label for example in examples}) == 1
    assert all(example.predicted_label == classify(example.image[None])[0] for example in examples)


def test_a_sample_keeps_the_shares_of_the_classes():
    labels = np.repeat([0, 1, 2], [500, 300, 50])
    chosen = stratified_sample(labels, 170, seed=3)
    assert len(set(chosen)) == 170
    assert np.abs(np.bincount(labels[chosen]) - [100, 60, 10]).max() <= 1
    assert (chosen == stratified_sample(labels, 170, seed=3)).all()
    assert (chosen != stratified_sample(labels, 170, seed=4)).any()
    assert (stratified_sample(labels, 10_000, seed=0) == np.arange(850)).all()
    assert len(set(labels[stratified_sample(np.arange(50), 7, seed=0)])) == 1  # fewer images than classes
    with pytest.raises(ValueError, match="at least 1"):
        stratified_sample(labels, 0, seed=0)


def test_severities_are_read():
    assert parse_severities("5, 1,3,3") == (1, 3, 5)
    for text in ("", "0", "1,6", "1;3", "all"):
        with pytest.raises(ValueError, match="from 1 to 5"):
            parse_severities(text)
