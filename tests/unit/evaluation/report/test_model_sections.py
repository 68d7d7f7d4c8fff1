import argparse
import re

import numpy as np
import pytest
import torch

from evaluation.metrics import Predictions
from evaluation.predict import predict
from evaluation.report import command, model_sections
from evaluation.report.sections.grad_cam import ClassMap, ExplainedImage, build_grad_cam, choose_images
from evaluation.report.sections.robustness import build_robustness
from evaluation.report.write import write_report
from evaluation.robustness.measure import CorruptedExample, CorruptionAccuracy, RobustnessResult
from tests.conftest import ROOT
from tests.unit.evaluation.report.test_write import HOSTILE, Page
from tests.unit.evaluation.test_crops import trained  # noqa: F401

IMAGE = np.zeros((16, 16, 3), np.uint8)


def options_of(prepared, *arguments):
    parser = argparse.ArgumentParser()
    model_sections.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.data, options.split = str(prepared[0]), "val"
    return options


def result_of(**changes):
    def cell(kind, severity, top1):
        return CorruptionAccuracy(kind, severity, round(200 * top1), top1, (top1 - 0.05, top1 + 0.05))

    fields = {
        "num_images": 200,
        "num_in_split": 1800,
        "resolution": 96,
        "seed": 0,
        "severities": (1, 5),
        "clean_top1": 0.8,
        "clean_top1_interval": (0.75, 0.85),
        "cells": (
            cell("impulse_noise", 1, 0.6),
            cell("impulse_noise", 5, 0.2),
            cell("fog", 1, 0.7),
            cell("fog", 5, 0.5),
            cell("brightness", 1, 0.8),
            cell("brightness", 5, 0.8),
        ),
    }
    return RobustnessResult(**(fields | changes))


def test_a_report_shows_both_sections(tmp_path, trained, prepared):  # noqa: F811
    predictions = predict(trained, prepared[0], loader="reference", progress=False)
    options = options_of(prepared, "--robustness", "digital", "--robustness-images", "20", "--grad-cam", "6")
    sections = model_sections.build_model_sections(trained, predictions, options, 40)
    files = write_report(
        tmp_path,
        predictions,
        lambda sample_id: IMAGE,
        title="t",
        metrics_rows=None,
        summary=None,
        details={},
        more_sections=sections,
    )
    page = Page(files.html)
    headings = re.findall("<h2>(.*?)</h2>", page.source)
    assert headings.index("Robustness to corruptions") < headings.index("What the model looks at")
    assert "a sample of the 43" in page.text and "Grad-CAM at the layer blocks" in page.text
    pictures = [attributes["alt"] for attributes in page.all("img")]
    assert {"Clean", "JPEG", "Low contrast"} <= set(pictures)
    assert len([alt for alt in pictures if alt.startswith("What speaks for")]) >= 6
    assert 0 <= files.metrics["report_robustness_mean_top1"] <= 1
    assert '"robustness": {"style": "ImageNet-C-style' in files.json.read_text(encoding="utf-8")


def test_sections_do_not_depend_on_the_order_of_the_predictions(trained, prepared):  # noqa: F811
    predictions = predict(trained, prepared[0], loader="reference", progress=False)
    order = np.random.default_rng(0).permutation(predictions.num_samples)
    shuffled = Predictions(
        predictions.logits[order],
        predictions.labels[order],
        predictions.sample_ids[order],
        predictions.class_names,
    )
    options = options_of(prepared, "--robustness", "weather", "--robustness-images", "9")
    options.robustness_severities = "2"
    sections = [
        model_sections.build_model_sections(trained, some, options, 40) for some in (predictions, shuffled)
    ]
    assert sections[0] == sections[1]


def test_a_network_without_places_leaves_a_sentence_in_place_of_maps(trained, prepared):  # noqa: F811
    predictions = predict(trained, prepared[0], loader="reference", progress=False)
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(40 * 40 * 3, 4))
    object.__setattr__(trained, "model", flat)
    (section,) = model_sections.build_model_sections(trained, predictions, options_of(prepared), 40)
    assert "no layer with a map of features" in section.note and section.body_html == ""
    with pytest.raises(ValueError, match="no layer 'blocks'"):
        options = options_of(prepared, "--grad-cam-layer", "blocks")
        model_sections.build_model_sections(trained, predictions, options, 40)


def test_options_that_make_no_sense_are_sentences(prepared):
    for arguments, words in (
        (("--robustness", "--robustness-images", "0"), "from 1 to"),
        (("--robustness", "--robustness-images", "99999999"), "from 1 to 28,532 at 224"),
        (("--robustness-severities", "7"), "from 1 to 5"),
        (("--grad-cam", "-1"), "from 0 to 200"),
        (("--grad-cam-layer", "layer9"), "no layer 'layer9'"),
    ):
        with pytest.raises(ValueError, match=words):
            model_sections.check_arguments(options_of(prepared, *arguments), torch.nn.Sequential(), 224)
    with pytest.raises(SystemExit):
        options_of(prepared, "--robustness", "rain")


def test_the_note_names_the_weakest_point(trained):  # noqa: F811
    section = build_robustness(result_of(), [], ["a", "b"])
    assert "Of 200 images (a sample of the 1,800, drawn by class, seed 0), 80.0% are right" in section.note
    assert "60.0% on average under 3 corruptions at severities 1 and 5: 75.0% of the clean" in section.note
    assert "Impulse noise is the weakest point, with 40.0% (of the groups, noise: 40.0%)" in section.note
    assert "brightness costs least, with 80.0%" in section.note
    assert section.metrics["robustness_relative"] == pytest.approx(0.75)
    shares = re.findall(r"--lost:([\d.]+)", section.body_html)
    assert shares == ["0.250", "0.750", "0.500", "0.125", "0.375", "0.250", "0.000", "0.000", "0.000"]


def test_one_corruption_of_a_model_that_is_always_wrong():
    cells = (CorruptionAccuracy("jpeg", 1, 0, 0.0, (0.0, 0.1)),)
    section = build_robustness(
        result_of(clean_top1=0.0, clean_top1_interval=(0.0, 0.1), severities=(1,), cells=cells),
        [],
        ["a", "b"],
    )
    assert section.note.endswith("0% on average under 1 corruption at severity 1.")
    assert "robustness_relative" not in section.metrics and "--lost:0.000" in section.body_html


def test_class_names_are_escaped():
    examples = [CorruptedExample("", 0, IMAGE, 0, 1), CorruptedExample("fog", 3, IMAGE, 1, 1)]
    items = [
        ExplainedImage(1, IMAGE, 1, 0.9, (ClassMap(0, IMAGE, False), ClassMap(1, IMAGE, True))),
        ExplainedImage(2, IMAGE, 1, 0.9, (ClassMap(1, IMAGE, False),)),
    ]
    names = (HOSTILE, HOSTILE + "2")
    for section in (
        build_robustness(result_of(), examples, names),
        build_grad_cam(items, names, HOSTILE, (3, 3), 0),
    ):
        assert "<script" not in section.body_html and "&lt;script" in section.body_html


def test_mistakes_show_two_classes_and_empty_maps_say_so():
    items = [
        ExplainedImage(1, IMAGE, 1, 0.9, (ClassMap(0, IMAGE, False), ClassMap(1, IMAGE, True))),
        ExplainedImage(2, IMAGE, 1, 0.4, (ClassMap(1, IMAGE, False),)),
    ]
    body = build_grad_cam(items, ["cat", "dog"], "layer4", (7, 7), 0).body_html
    captions = re.findall("<span>(.*?)</span>", body)
    assert captions == ["true: dog", "for cat", "nothing for dog", "true: dog", "for dog"]
    assert "✗ cat" in body and "✓ dog" in body
    assert build_grad_cam([], ["cat"], "layer4", (7, 7), 0) is None


def predictions_of(confidences, is_right):
    """Two classes, all images of class 0, sample ids from 100 downwards."""
    margins = np.array(confidences)
    logits = np.stack([np.where(is_right, margins, 0), np.where(is_right, 0, margins)], axis=1)
    num = len(margins)
    return Predictions(logits, np.zeros(num, np.int64), 100 - np.arange(num), ("a", "b"))


def test_half_of_the_images_are_the_most_confident_mistakes():
    is_right = np.array([True, False, True, False, True, False, True, True])
    predictions = predictions_of([9, 1, 2, 3, 4, 2, 1, 8], is_right)
    chosen = choose_images(predictions, 4, seed=0)
    assert chosen[:2].tolist() == [3, 5] and is_right[chosen[2:]].all() and len(set(chosen)) == 4
    assert (chosen == choose_images(predictions, 4, seed=0)).all()
    assert any((choose_images(predictions, 4, seed) != chosen).any() for seed in range(1, 6))
    everything = choose_images(predictions, 50, seed=0)
    assert sorted(everything) == list(range(8)) and everything[:3].tolist() == [3, 5, 1]
    only_right = choose_images(predictions_of([1, 2, 3], np.array([True] * 3)), 2, seed=0)
    assert len(set(only_right)) == 2


def test_documented_commands_have_these_options():
    text = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    commands = re.findall(r"python -m evaluation ([^#\n]*)", text)
    assert len(commands) == 4
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for line in commands:
        options = parser.parse_args(line.split())
        model_sections.check_arguments(options, torch.nn.ModuleDict({"layer3": torch.nn.ReLU()}), 96)
