from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evaluation.compare.comparison import compare
from evaluation.compare.figures import ComparedRun, with_figures
from evaluation.compare.model_cost import MeasuredCost, StaticCost
from evaluation.compare.plots import COLOURS, class_differences, pareto_front, plot_curves
from evaluation.compare.runs import MAX_RUNS, read_run_folder, with_own_names
from evaluation.compare.table import markdown_table
from evaluation.compare.write import write_comparison
from tests.unit.evaluation.compare.made_up import make_predictions, write_run
from tests.unit.evaluation.report.test_write import HOSTILE, Page


def make_runs(tmp_path, top1s, names=None, num_images=400, with_predictions=True):
    """One run a series of validations; it has that share of the images right, the first ones."""
    names = names or [f"run-{position}" for position in range(len(top1s))]
    records = with_own_names(
        [
            replace(read_run_folder(write_run(tmp_path / f"r{position}", top1)), name=name)
            for position, (top1, name) in enumerate(zip(top1s, names, strict=True))
        ]
    )
    runs = []
    for position, (record, top1) in enumerate(zip(records, top1s, strict=True)):
        right = np.arange(num_images) < top1[-1] * num_images
        run = ComparedRun(
            letter=chr(ord("A") + position),
            record=record,
            static=StaticCost(10_000 * (position + 1), 40, 2e6 * (position + 1), 40_000),
            measured=MeasuredCost({1: 10**7, 64: 10**8}, {1: 0.01, 64: 0.1 * (position + 1)}),
            predictions=make_predictions(right, num_classes=6) if with_predictions else None,
            num_classes=6,
            num_images=num_images,
            data_sha256="a" * 64,
        )
        runs.append(with_figures(run))
    return runs


def steady(last):
    return (last - 0.3, last - 0.1, last - 0.02, last - 0.01, last)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three runs with hostile names: (files, page, comparison)."""
    tmp_path = tmp_path_factory.mktemp("compare")
    names = [HOSTILE, "$title | ${sections}", "=cmd()"]
    runs = make_runs(tmp_path, [steady(0.6), steady(0.8), steady(0.79)], names)
    runs[0] = replace(runs[0], notes=(f"It says {HOSTILE}.",))
    comparison = compare(runs, None, notes=[f"A note with {HOSTILE}"])
    files = write_comparison(tmp_path / "out", comparison, split="val")
    return files, Page(files.html), comparison


def test_hostile_names_are_text_and_never_markup(written):
    _, page, _ = written
    assert page.all("script") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert HOSTILE in page.text and "$title | ${sections}" in page.text
    assert f"It says {HOSTILE}." in page.text and f"A note with {HOSTILE}" in page.text


def test_page_needs_nothing_but_itself(written):
    _, page, _ = written
    assert "http://" not in page.source and "https://" not in page.source and "url(" not in page.source
    for _, attributes in page.elements:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "default-src 'none'" in next(m["content"] for m in page.all("meta") if "http-equiv" in m)


def test_page_says_who_is_best_and_how_surely(written):
    _, page, comparison = written
    assert "has the highest top-1: 80.0% of 400 images (val)" in page.text
    assert "It cannot be told from =cmd(), 1.0 points behind it" in page.text
    assert "is worse than $title | ${sections} by 20.0 points (95% 16" in page.text
    assert comparison.num_wrong_for_all == 80 and "wrong on 80 images (20.0%)" in page.text


def test_every_shown_figure_is_explained(written):
    _, page, _ = written
    for term in (
        "FLOPs are 2 × MACs",
        "Wilson’s score interval",
        "McNemar’s test",
        "Holm’s correction",
        "Pareto front",
        "resident memory above",
        "robust standard deviations",
        "Steady, restless",
    ):
        assert term in page.text
    assert page.text.count("Pareto") >= 2


def test_json_has_every_figure_as_a_number(written):
    files, _, _ = written

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    numbers = json.loads(files.json.read_text(), parse_constant=refuse)
    assert (numbers["best"], numbers["second"], numbers["baseline"]) == ("B", "C", "B")
    figures = numbers["runs"][0]["figures"]
    assert figures["top1"] == 0.6 and figures["best_top1"] == 0.6
    assert figures["top1_low"] < 0.6 < figures["top1_high"]
    assert (figures["forward_flops"], figures["forward_macs"]) == (2e6, 1e6)
    assert figures["inference_images_per_second"] == 640 and figures["stability"] == "steady"
    assert figures["epochs_to_near_best"] == 4
    first = numbers["paired"][0]
    assert (first["num_only_model"], first["num_only_baseline"]) == (0, 80)
    assert first["difference"] == pytest.approx(-0.2)
    assert numbers["class_differences"][0]["num_images"] in (66, 67)


def test_csv_has_a_row_a_run_and_no_formula(written):
    files, _, _ = written
    rows = list(csv.DictReader(io.StringIO(files.csv.read_text())))
    assert [row["letter"] for row in rows] == ["A", "B", "C"]
    assert rows[2]["run"] == "'=cmd()"
    assert float(rows[1]["top1"]) == 0.8 and float(rows[1]["best_top1_low"]) < 0.8
    assert rows[0]["model"] == "own residual_cnn"


def test_markdown_has_a_line_a_figure_and_as_many_cells_everywhere(written):
    files, _, comparison = written
    lines = markdown_table(comparison.runs).splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {5}
    assert any(line.startswith("| Best top-1") and "80.0% (75.8–83.6%)" in line for line in lines)
    assert "<script" not in files.markdown.read_text()


def test_plots_are_pictures_and_belong_to_this_comparison(written, tmp_path):
    files, page, _ = written
    assert set(files.plots) == {
        "curves.png", "trade_offs.png", "confusion_matrix.png", "class_differences.png"
    }  # fmt: skip
    for path in files.plots.values():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and 400 <= picture.width <= 2100
    assert len(page.all("img")) == 4 and all(image["alt"] for image in page.all("img"))


def test_plots_of_an_earlier_comparison_go(tmp_path):
    runs = make_runs(tmp_path, [steady(0.6), steady(0.8)])
    write_comparison(tmp_path / "out", compare(runs, None), split="val")
    bare = [with_figures(replace(run, predictions=None)) for run in runs]
    files = write_comparison(tmp_path / "out", compare(bare, None), split="val")
    assert set(files.plots) == {"curves.png", "trade_offs.png"}
    assert not (tmp_path / "out" / "confusion_matrix.png").exists()
    page = Page(files.html)
    assert "No test on the same images backs this" in page.text
    assert "--data" in page.text


def test_eight_runs_have_eight_colours_and_letters(tmp_path):
    runs = make_runs(tmp_path, [steady(0.5 + 0.03 * position) for position in range(MAX_RUNS)])
    assert len(set(COLOURS)) == MAX_RUNS
    figure = plot_curves(runs)
    texts = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert texts == set("ABCDEFGH")
    figure.canvas.draw()
    ends = sorted(text.get_window_extent().y0 for text in figure.axes[0].texts)
    assert min(np.diff(ends)) > 4  # letters at the ends do not lie on each other


def test_the_baseline_can_be_named_in_several_ways(tmp_path):
    runs = make_runs(tmp_path, [steady(0.6), steady(0.8), steady(0.7)])
    for name in ("run-0", "A", str(tmp_path / "r0"), f"{tmp_path / 'r0'}/"):
        comparison = compare(runs, name)
        assert comparison.baseline.letter == "A" and comparison.best.letter == "B"
        assert [pair.run.letter for pair in comparison.pairs] == ["B", "C"]
    with pytest.raises(ValueError, match="run-0, run-1, run-2"):
        compare(runs, "run-9")


def test_runs_of_other_images_are_compared_by_their_own_figures_only(tmp_path):
    runs = make_runs(tmp_path, [steady(0.6), steady(0.8), steady(0.7)])
    other = replace(runs[1], predictions_sha256="b" * 64, data_sha256="b" * 64)
    comparison = compare([runs[0], other, runs[2]], None)
    assert comparison.best.letter == "C" and [pair.run.letter for pair in comparison.pairs] == ["A"]
    assert comparison.runs[1].predictions is None and "top1" not in comparison.runs[1].figures
    assert any("run-1 is of other images" in note for note in comparison.notes)
    assert any("different images" in note for note in comparison.notes)


def test_two_runs_of_different_images_are_not_tested_at_all(tmp_path):
    runs = make_runs(tmp_path, [steady(0.6), steady(0.8)])
    shifted = replace(runs[1], predictions=make_predictions(np.ones(400), num_classes=6, first_id=9))
    comparison = compare([runs[0], shifted], None)
    assert not comparison.is_paired and comparison.pairs == ()
    assert comparison.best.letter == "B"  # by its own validations


def test_pareto_front_by_hand():
    costs = np.array([1.0, 2.0, 2.0, 3.0, 4.0, 1.0])
    gains = np.array([0.5, 0.7, 0.6, 0.7, 0.9, 0.5])
    # The third and fourth are beaten by the second; equals both stay.
    assert pareto_front(costs, gains).tolist() == [True, True, False, False, True, True]


def test_class_differences_by_hand():
    right = np.array([1, 1, 1, 1, 0, 1, 0, 1])  # two classes in turn
    other = np.array([1, 0, 1, 0, 1, 1, 1, 1])
    found = class_differences(make_predictions(right, 2), make_predictions(other, 2))
    assert found == [("class 0", 0.5, 1.0, 4), ("class 1", 1.0, 0.5, 4)]
