import math
import warnings

import numpy as np
import pytest

from evaluation.calibration import measure_calibration
from evaluation.image_properties import ImageProperties
from evaluation.metrics import Predictions, evaluate
from evaluation.plot_style import PHONE_INCHES, WIDE_INCHES, png_bytes
from evaluation.report.calibration_plot import plot_calibration
from evaluation.report.section import ReportContent
from evaluation.report.sections import calibration, confusion, mistakes, properties
from evaluation.report.sections.mistakes import rank_mistakes


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """What is drawn is seen in the tests of the plots."""
    from evaluation import plot_image

    for module in (plot_image, mistakes):
        monkeypatch.setattr(module, "png_bytes", lambda figure: b"\x89PNG" + bytes(40))


def make_content(predictions, **changes):
    fields = {
        "title": "t",
        "predictions": predictions,
        "results": evaluate(predictions),
        "read_image": lambda sample_id: np.full((9, 9, 3), sample_id % 256, np.uint8),
        "metrics_rows": (),
        "summary": {},
        "details": {},
        "sample_key": lambda sample_id: f"val/{sample_id}.jpg",
    }
    return ReportContent(**(fields | changes))


def make_predictions(num_samples=600, num_classes=4, scale=1.0, names=None):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(num_samples, num_classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    ids = 1000 + rng.permutation(num_samples)
    return Predictions(scale * logits, labels, ids, names or tuple(f"c{k}" for k in range(num_classes)))


def test_mistakes_are_ranked_by_confidence_and_by_the_truths_probability():
    p = [[0.9, 0.06, 0.04], [0.5, 0.49, 0.01], [0.6, 0.1, 0.3], [0.1, 0.8, 0.1]]
    predictions = Predictions(np.log(p), np.array([1, 2, 2, 1]), np.array([7, 6, 5, 4]), ("a", "b", "c"))
    surest, least_true = rank_mistakes(predictions)
    assert surest.tolist() == [0, 2, 1] and least_true.tolist() == [1, 0, 2]  # the last row is right
    tied = Predictions(np.log(p)[[0, 0]], np.array([1, 1]), np.array([9, 3]), ("a", "b", "c"))
    assert rank_mistakes(tied)[0].tolist() == [1, 0]
    # Probabilities that float32 rounds to 0 and 1 still have an order.
    far = Predictions(np.array([[500.0, 0], [900, 0]]), np.array([1, 1]), np.arange(2), ("a", "b"))
    assert rank_mistakes(far)[1].tolist() == [1, 0]


def test_mistakes_are_shown_with_their_source_and_none_twice():
    section = mistakes.build(make_content(make_predictions()))
    first, more = (section.figures[key] for key in ("most_confident_mistakes", "least_probable_truths"))
    ids = [item["sample_id"] for item in first + more]
    assert len(first) == 12 and len(set(ids)) == len(ids)
    assert [item["confidence"] for item in first] == sorted((i["confidence"] for i in first), reverse=True)
    assert first[0]["source"] == f"val/{ids[0]}.jpg" and f"val/{ids[0]}.jpg" in section.body_html
    assert "python -m evaluation audit" in section.note
    labels = np.arange(4)
    perfect = make_content(Predictions(np.eye(4), labels, labels, tuple("abcd")))
    assert mistakes.build(perfect) is None


@pytest.mark.parametrize(
    ("scale", "word"), [(4.0, "overconfident"), (0.3, "underconfident"), (1.0, "neither too sure")]
)
def test_confidence_is_put_into_words(scale, word):
    section = calibration.build(make_content(make_predictions(scale=scale)))
    assert word in section.note
    figures = section.figures["calibration"]
    assert section.metrics["ece"] == figures["before"]["ece"] and figures["num_bins"] == 15
    assert section.metrics["temperature"] == pytest.approx(scale, rel=0.2)
    assert ("does not help" in section.note) == (scale == 1.0)
    gap = 100 * abs(figures["before"]["overconfidence"])
    assert word == "neither too sure" or f"by {gap:.1f} points" in section.note


def test_few_images_have_no_temperature_and_one_class_no_confidence():
    section = calibration.build(make_content(make_predictions(num_samples=12)))
    assert "too few images" in section.note and "temperature" not in section.metrics
    one = Predictions(np.zeros((3, 1)), np.zeros(3, int), np.arange(3), ("all",))
    assert calibration.build(make_content(one)) is None


@pytest.mark.parametrize("width_inches", [WIDE_INCHES, PHONE_INCHES])
def test_reliability_diagram_shows_each_bin_and_every_image(width_inches):
    measured = measure_calibration(make_predictions())
    figure = plot_calibration({"before": measured, "after": measured}, width_inches=width_inches)
    diagram, histogram = figure.axes[:2]
    points = diagram.collections[-1].get_offsets()
    filled = [b for b in measured.bins if b.count]
    assert points.tolist() == pytest.approx(np.array([(b.confidence, b.top1) for b in filled]))
    assert math.isclose(sum(bar.get_height() for bar in histogram.patches), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(png_bytes(figure)) > 1000


def make_properties(predictions, values, **changes):
    order = np.argsort(predictions.sample_ids)
    names = ("size", "aspect_ratio", "brightness", "contrast", "bytes_per_pixel")
    fields = {name: np.ones(len(order)) for name in names} | {"brightness": values[order]}
    return ImageProperties(predictions.sample_ids[order], fields, **({"num_in_split": len(order)} | changes))


def test_a_property_that_decides_is_named_and_one_that_does_not_is_not():
    predictions = make_predictions()
    is_right = predictions.label_ranks == 0
    noise = np.random.default_rng(1).random(len(is_right))
    deciding = make_properties(predictions, is_right + noise)
    section = properties.build(make_content(predictions, properties=deciding))
    assert "Top-1 differs with brightness: from 0% to 100%." in section.note
    assert "In size and shape and contrast and detail the images are alike" in section.note
    groups = section.figures["image_properties"]["groups"]["brightness"]
    assert groups[0]["top1"] == 0 and groups[-1]["top1"] == 1
    assert sum(group["count"] for group in groups) == 600
    chance = make_properties(predictions, noise, num_in_split=50_000)
    section = properties.build(make_content(predictions, properties=chance))
    assert "No property goes with a difference" in section.note
    assert "Measured on 600 images drawn at random" in section.note


def test_alike_images_and_unmeasured_ones_leave_no_plot():
    predictions = make_predictions()
    section = properties.build(
        make_content(predictions, properties=make_properties(predictions, np.ones(600)))
    )
    assert section.body_html == "" and not section.files
    assert properties.build(make_content(predictions)) is None


def test_many_classes_are_put_in_the_order_of_their_groups():
    num_classes = 30
    labels = np.arange(num_classes).repeat(10)
    answers = labels.copy()
    answers[::10] = (labels[::10] + 15) % num_classes  # each is taken for the one 15 further on
    predictions = Predictions(
        np.eye(num_classes)[answers], labels, np.arange(300), tuple(f"<c{k}>" for k in range(num_classes))
    )
    section = confusion.build(make_content(predictions))
    order = section.figures["class_order"]
    assert all(abs(order.index(k) - order.index(k + 15)) == 1 for k in range(15))
    assert section.figures["confusion_matrix"][0][15] == 1  # in label order, whatever is drawn
    assert "1 image, 10.0% of the class; 1 the other way" in section.body_html
    assert "&lt;c0&gt; → &lt;c15&gt;" in section.body_html and "<c0>" not in section.body_html
    few = confusion.build(make_content(make_predictions()))
    assert few.figures["class_order"] is None
