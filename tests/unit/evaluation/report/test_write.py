import base64
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from evaluation import plot_image
from evaluation.metrics import Predictions, confusion_matrix, topk_accuracy
from evaluation.report.page import HELD_OUT
from evaluation.report.section import Section
from evaluation.report.sections import mistakes
from evaluation.report.sections import predictions as predictions_section
from evaluation.report.write import write_report
from evaluation.text import count_text, duration_text, interval_text, percent_text

HOSTILE = '<script>alert("x")</script>'
SUMMARY = {
    "final_top1": 0.7631,
    "best_top1": 0.764,
    "best_epoch": 15,
    "validation_resolution": 224,
    "epochs": 16,
    "world_size": 8,
    "num_parameters": 25_557_032,
    "images_per_second": 9812.3,
    "data_wait_fraction": 0.012,
    "wall_seconds": 2155.0,
    "cost_usd": 11.734,
}
ROWS = [
    {"split": "train", "step": 10, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1},
    {"split": "val", "step": 20, "epoch": 1, "loss": 1.5, "top1": 0.4, "top5": 0.8},
]


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.elements = []
        self.words = []
        self._open = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in {"meta", "link", "img", "source", "br"}:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def make_predictions(num_samples=60, num_classes=7, seed=0, names=None):
    """The last class has no sample."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes - 1, num_samples)
    logits = rng.normal(size=(num_samples, num_classes)) + 2.5 * np.eye(num_classes)[labels]
    names = names or [f"class {label}" for label in range(num_classes)]
    return Predictions(logits, labels, 100 + np.arange(num_samples), tuple(names))


def read_image(sample_id):
    image = np.zeros((20 + sample_id % 7, 30, 3), dtype=np.uint8)
    image[..., 0] = sample_id % 256
    return image


def write(out_dir, predictions, **changes):
    arguments = {"title": "A run", "metrics_rows": None, "summary": SUMMARY, "details": {"resolution": "256"}}
    return write_report(out_dir, predictions, read_image, **(arguments | {"num_grid_images": 2} | changes))


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Drawing is most of a report's time: only `report`, made before this, and who undoes it pay for it."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "PNG")
    for module in (plot_image, mistakes, predictions_section):
        monkeypatch.setattr(module, "png_bytes", lambda figure: buffer.getvalue())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One report with a hostile name everywhere a name can come from: (files, page, predictions)."""
    names = [HOSTILE, "b&b", "$title", "${sections}", 'quote" onload="x', "plain", "never seen"]
    predictions = make_predictions(names=names)
    details = {"resolution": "256", f"key {HOSTILE}": f"value {HOSTILE}", "data": "s3://shards/set"}
    arguments = {"title": HOSTILE, "details": details, "metrics_rows": ROWS, "num_grid_images": 6}
    files = write(tmp_path_factory.mktemp("run") / "new" / "report", predictions, **arguments)
    return files, Page(files.html), predictions


def test_hostile_names_are_text_and_never_markup(report):
    _, page, _ = report
    assert len(page.all("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert HOSTILE in page.text  # read as it is written, by everyone who looks
    assert f"key {HOSTILE}" in page.text and f"value {HOSTILE}" in page.text
    assert 'quote" onload="x' in page.text
    # string.Template must not expand what a class is called.
    assert "$title" in page.text and "${sections}" in page.text


def test_hostile_names_are_text_in_prose_too(tmp_path):
    labels = np.array([0, 1, 1])
    predictions = Predictions(np.eye(2)[[1, 1, 1]], labels, labels + np.arange(3), (HOSTILE, "<b>easy</b>"))
    page = Page(write(tmp_path, predictions, num_grid_images=0).html)
    assert f"The hardest class is {HOSTILE} with 0% top-1, the easiest <b>easy</b> with 100%." in page.text


def test_page_needs_nothing_but_itself(report):
    _, page, _ = report
    assert "http://" not in page.source and "https://" not in page.source
    for _, attributes in page.elements:
        for name in ("src", "srcset", "href", "data", "poster", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "@import" not in page.source and "url(" not in page.source
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy


def test_pictures_of_the_page_can_be_decoded(report):
    _, page, _ = report
    sources = [image["src"] for image in page.all("img")] + [
        source["srcset"] for source in page.all("source")
    ]
    assert len(page.all("source")) == 4  # the plots, each for a phone too
    # Random images and mistakes are figures; the confused pairs have small ones besides.
    photographs = [image for image in page.all("img") if image.get("title", "").startswith("sample ")]
    assert len(page.all("img")) == 4 + len(photographs) and len(photographs) > len(page.all("figure")) > 6
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).load()
    assert all(image["alt"] for image in page.all("img"))


def test_plots_are_shown_at_half_their_pixels(report):
    files, page, _ = report
    for image, path in zip(
        page.all("img"),
        [files.plots["training_curves.png"], files.plots["confusion_matrix.png"]],
        strict=False,
    ):
        assert int(image["width"]) == Image.open(path).width // 2


def test_figures_are_written_as_png(report):
    files, _, _ = report
    assert len(files.plots) == 6
    for path in files.plots.values():
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert 400 <= picture.width <= 2100 and 200 <= picture.height <= 4000


def test_nothing_else_is_left_in_the_folder(report):
    files, _, _ = report
    assert {path.name for path in files.html.parent.iterdir()} == {
        "report.html",
        "report.json",
        "predictions.npz",
        "confusion_matrix.png",
        "per_class_accuracy.png",
        "calibration.png",
        "confident_mistakes.png",
        "training_curves.png",
        "prediction_grid.png",
    }


def test_json_holds_the_numbers_as_fractions_and_no_nan(report):
    files, _, predictions = report

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    numbers = json.loads(files.json.read_text(encoding="utf-8"), parse_constant=refuse)
    assert numbers["top1"] == topk_accuracy(predictions, 1)
    assert numbers["top5"] == topk_accuracy(predictions, 5)
    assert numbers["top1_interval"][0] < numbers["top1"] < numbers["top1_interval"][1] <= 1
    assert (numbers["num_samples"], numbers["num_classes"]) == (60, 7)
    assert numbers["confusion_matrix"] == confusion_matrix(predictions).tolist()
    assert [row["name"] for row in numbers["per_class"]] == list(predictions.class_names)
    assert numbers["per_class"][-1]["top1"] is None and numbers["per_class"][-1]["count"] == 0
    assert numbers["details"]["resolution"] == "256"
    pair = numbers["most_confused_pairs"][0]
    assert numbers["confusion_matrix"][pair["true_label"]][pair["predicted_label"]] == pair["count"]
    assert pair["true"] == predictions.class_names[pair["true_label"]]


def test_headline_names_accuracy_resolution_speed_time_and_cost(report):
    files, page, _ = report
    numbers = json.loads(files.json.read_text(encoding="utf-8"))
    assert "Top-1 accuracy at 256 pixels" in page.text
    assert percent_text(numbers["top1"]) in page.text and percent_text(numbers["top5"]) in page.text
    assert f"95% interval {interval_text(tuple(numbers['top1_interval']))}" in page.text
    assert "60 images of 6 of 7 classes" in page.text
    for figure in ("9,812 images/s", "1.2% waiting", "35 min 55 s", "$11.73", "16 epochs", "25.6 million"):
        assert figure in page.text
    assert "measured 76.31% top-1 at 224 pixels" in page.text
    assert "76.40%, chosen on the images it is judged by" in page.text


def test_table_has_a_row_a_class_hardest_first_and_empty_classes_last(report):
    _, page, _ = report
    rows = re.findall(r"<tr><td.*?</tr>", page.source)
    shares = [float(match[1]) for row in rows if (match := re.search(r"--share:([\d.]+)", row))]
    assert len(rows) == 7 and len(shares) == 6
    assert shares == sorted(shares)
    assert "never seen" in rows[-1] and "–" in rows[-1]
    heads = [head for head in page.all("th") if "aria-sort" in head]
    num_columns = len(heads)
    assert all(row.count("<td") == num_columns for row in rows)
    assert [head["aria-sort"] for head in heads].count("ascending") == 1


def test_wrong_predictions_are_marked_by_symbol_and_name_the_truth(tmp_path):
    labels = np.array([0, 1])
    predictions = Predictions(np.array([[5.0, 0.0], [5.0, 0.0]]), labels, labels, ("forest", "sea"))
    page = Page(write(tmp_path, predictions).html)
    assert "✓ forest 99% confident" in page.text
    assert "✗ forest true: sea (1%) 99% confident" in page.text
    assert "2 images drawn at random (seed 0), 1 of them right" in page.text
    # Among two classes "top five" says nothing.
    assert "Top-5" not in page.text and "first five" not in page.text


def test_report_without_a_run_leaves_its_sections_out(tmp_path):
    predictions = make_predictions()
    write(tmp_path, predictions, metrics_rows=ROWS)
    files = write(tmp_path, predictions, summary=None, details={}, num_grid_images=0)
    page = Page(files.html)
    assert not {"training_curves.png", "prediction_grid.png"} & set(files.plots)
    # Figures of the earlier report would be taken for this one's.
    assert not (tmp_path / "training_curves.png").exists() and not (tmp_path / "prediction_grid.png").exists()
    assert page.text.count("accuracy at") == 0
    for missing in ("Training", "Predictions", "Details", "None", "nan"):
        assert missing not in page.text


@pytest.mark.parametrize("rows", [[], [{"split": "val", "epoch": 0}]])
def test_rows_without_a_curve_are_no_error(tmp_path, rows):
    files = write(tmp_path, make_predictions(), metrics_rows=rows, num_grid_images=0)
    assert "training_curves.png" not in files.plots


def test_summary_with_holes_is_no_error(tmp_path):
    summary = {"cost_usd": None, "wall_seconds": float("nan"), "images_per_second": "fast", "final_top1": 0.5}
    page = Page(write(tmp_path, make_predictions(), summary=summary, details={}, num_grid_images=0).html)
    assert "measured 50.00% top-1 after its last epoch" in page.text
    assert "Training cost" not in page.text and "nan" not in page.text and "fast" not in page.text


def test_resolution_of_the_summary_is_named_where_details_have_none(tmp_path):
    page = Page(write(tmp_path, make_predictions(), details={}, num_grid_images=0).html)
    assert "Top-1 accuracy at 224 pixels" in page.text


def test_a_perfect_and_a_hopeless_model_can_be_reported(tmp_path):
    labels = np.arange(4)
    perfect = Predictions(np.eye(4), labels, labels, tuple("abcd"))
    page = Page(write(tmp_path, perfect, num_grid_images=0).html)
    assert "Not one image was misclassified" in page.text and "right for 100%" in page.text
    hopeless = Predictions(np.roll(np.eye(4), 1, axis=1), labels, labels, tuple("abcd"))
    page = Page(write(tmp_path, hopeless, num_grid_images=0).html)
    assert "right for 0%" in page.text


def test_the_same_input_gives_the_same_files(tmp_path, monkeypatch):
    monkeypatch.undo()
    predictions = make_predictions()
    first, second = write(tmp_path / "a", predictions), write(tmp_path / "b", predictions)
    for path in (first.html, first.json, first.predictions, *first.plots.values()):
        assert path.read_bytes() == (second.html.parent / path.name).read_bytes()


@pytest.mark.parametrize("num_grid_images", [0, 5])
def test_only_images_that_are_shown_are_read(tmp_path, num_grid_images):
    read = []

    def count(sample_id):
        read.append(sample_id)
        return read_image(sample_id)

    arguments = {"title": "t", "metrics_rows": None, "summary": None, "details": {}}
    write_report(tmp_path, make_predictions(), count, **arguments, num_grid_images=num_grid_images)
    shown = re.findall(r'title="sample (\d+)"', (tmp_path / "report.html").read_text())
    assert sorted(read) == sorted(map(int, shown))
    assert (len(read) > 5) == (num_grid_images > 0)


def test_a_failure_leaves_the_earlier_report_untouched(tmp_path, monkeypatch):
    write(tmp_path, make_predictions(), num_grid_images=0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def lost(sample_id):
        raise OSError("the shard is gone")

    with pytest.raises(OSError, match="shard"):
        write_report(
            tmp_path, make_predictions(seed=1), lost, title="t", metrics_rows=None, summary=None, details={}
        )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    # A full disk in the middle of a file: the old page stays whole and no temporary file is left.
    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, make_predictions(seed=1), num_grid_images=0)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.filterwarnings("ignore:Glyph")  # of the figures' font; the page uses the reader's
def test_names_that_are_no_valid_text_can_be_written(tmp_path):
    names = ["caf\udce9", "日本", "c", "d", "e", "f", "g"]
    files = write(tmp_path, make_predictions(num_samples=12, names=names), num_grid_images=0)
    page = files.html.read_text(encoding="utf-8")
    assert "caf\\udce9" in page and "日本" in page
    assert json.loads(files.json.read_text(encoding="utf-8"))["per_class"][0]["name"] == names[0]


def test_a_thousand_classes_can_be_reported(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 3000)
    logits = rng.normal(size=(3000, 1000)).astype(np.float32)
    logits[np.arange(3000), labels] += 3
    predictions = Predictions(
        logits, labels, np.arange(3000), tuple(f"class {label}" for label in range(1000))
    )
    files = write(tmp_path, predictions, num_grid_images=2)
    assert len(re.findall(r"<tr><td", files.html.read_text(encoding="utf-8"))) == 1000
    assert files.html.stat().st_size < 3_000_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent_text(0.7631, 2), "76.31%"),
        (percent_text(0.99999), "99.9%"),
        (percent_text(0.00001), "0.1%"),
        (percent_text(1.0), "100%"),
        (percent_text(0.0), "0%"),
        (interval_text((0.7594, 0.7668)), "75.9–76.7%"),
        (interval_text((0.0, 0.2775)), "0–27.8%"),
        (duration_text(95655.6), "26 h 34 min"),
        (duration_text(2155.4), "35 min 55 s"),
        (duration_text(59.6), "1 min 0 s"),
        (duration_text(3), "3 s"),
        (count_text(1, "image"), "1 image"),
        (count_text(50_000, "image"), "50,000 images"),
        (count_text(0, "class", "classes"), "0 classes"),
    ],
)
def test_numbers_read_well(text, expected):
    assert text == expected


def test_a_section_of_a_commands_own_comes_before_the_details(tmp_path):
    png = b"\x89PNG of a robust model"
    extra = Section(
        f"Robust {HOSTILE}", "note", "<b>body</b>", {"robust.png": png}, {"robust": 0.5}, {"robust": 0.5}
    )
    files = write(tmp_path, make_predictions(), more_sections=[extra], num_grid_images=0)
    page = Page(files.html)
    assert page.text.index(f"Robust {HOSTILE} note body") < page.text.index("Details")
    assert (tmp_path / "robust.png").read_bytes() == png
    assert json.loads(files.json.read_text())["robust"] == files.metrics["report_robust"] == 0.5
    write(tmp_path, make_predictions(), num_grid_images=0)
    assert not (tmp_path / "robust.png").exists()


@pytest.mark.parametrize("content", ['{"files": ["../kept.png", "kept.txt", 3]}', '{"files": 1}', "[", "[]"])
def test_a_damaged_or_hostile_earlier_report_costs_no_file(tmp_path, content):
    out, kept = tmp_path / "report", [tmp_path / "kept.png", tmp_path / "report" / "kept.txt"]
    out.mkdir()
    for path in kept:
        path.write_text("mine")
    (out / "report.json").write_text(content)
    write(out, make_predictions(), num_grid_images=0)
    assert all(path.read_text() == "mine" for path in kept)


def test_a_training_that_left_out_a_fold_is_said_to_have_been_judged_on_other_images(tmp_path):
    summary = {"final_top1": 0.325, "validation_resolution": 160}
    fold = "fold 0 of 3 of the training images"
    files = write(tmp_path, make_predictions(), summary=summary, details={HELD_OUT: fold}, num_grid_images=0)
    assert f"32.50% top-1 at 160 pixels on {fold}, not on these images" in files.html.read_text()
    files = write(tmp_path, make_predictions(), summary=summary, details={}, num_grid_images=0)
    assert "not on these images" not in files.html.read_text()
