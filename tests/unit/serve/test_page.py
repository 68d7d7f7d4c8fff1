"""What the page says and shows, without a server: models, explanations, tables, snippets."""

from __future__ import annotations

import ast
import csv
import io
import re
import shlex
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve.page import parts
from serve.page.classifying import Row, as_csv, classify_many, classify_one, explain, shown_names
from serve.page.heat import DIMMED, coloured, picture
from serve.page.models import Entry, Shelf, ShownModel
from serve.page.snippets import curl_snippet, python_snippet
from serve.portable.classifier import Classifier
from serve.portable.model_info import ModelInfo
from serve.portable.preprocessing import Preprocessing
from tests.conftest import ROOT

NAMES = ("red", "green", "blue", "<b>grey</b>", "white", "black")
INFO = ModelInfo(Preprocessing(8, 1.0, (0.5,) * 3, (0.25,) * 3), NAMES)


class MeanColour(Classifier):
    """Says which of three colours an image has most of."""

    def logits(self, images):
        assert images.shape[1:] == (8, 8, 3) and images.dtype == np.uint8
        means = images.reshape(len(images), -1, 3).mean(1) / 25
        return np.concatenate([means, np.zeros((len(images), 3))], 1).astype(np.float32)


def image_bytes(colour, width=12, height=8, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def model():
    return ShownModel(MeanColour(INFO), lambda prepared, label: np.full((2, 2), label / 10, np.float32))


def test_a_few_models_stay_open():
    opened = []
    shelf = Shelf(
        [Entry(name, lambda name=name: opened.append(name) or ShownModel(name)) for name in "abc"], keep=2
    )
    assert opened == []
    for name in (None, "b", "a", "c", "a", "b"):  # c puts b away, b puts c away
        assert shelf.open(name).classifier == (name or "a")
    assert opened == ["a", "b", "c", "b"]
    with pytest.raises(ValueError, match="no model 'd' here: choose one of a, b, c"):
        shelf.open("d")


def test_a_model_that_cannot_be_opened_does_not_count(model):
    def fails():
        raise ValueError("it is damaged")

    shelf = Shelf([Entry("good", lambda: model), Entry("bad", fails, "top-1 1.00%")], keep=2)
    shelf.open("good")
    for _ in range(2):
        with pytest.raises(ValueError, match="it is damaged"):
            shelf.open("bad")
    assert shelf.open("good") is model
    assert shelf.choices == [("good", "good"), ("bad · top-1 1.00%", "bad")]


def test_who_uses_an_open_model_does_not_wait_for_one_that_is_fetched(model):
    asked, fetched = threading.Event(), threading.Event()

    def fetch():
        asked.set()
        assert fetched.wait(60)
        return model

    shelf = Shelf([Entry("open", lambda: model), Entry("far", fetch)], keep=2)
    shelf.open("open")
    visitor = threading.Thread(target=shelf.open, args=("far",))
    visitor.start()
    assert asked.wait(30)
    try:
        other = threading.Thread(target=shelf.open, args=("open",))
        other.start()
        other.join(30)
        assert not other.is_alive()
    finally:
        fetched.set()
        visitor.join(30)


def test_colours_of_heat_are_those_of_the_report():
    from matplotlib import colormaps

    values = np.linspace(0, 1, 101, dtype=np.float32)[None]
    wanted = 255 * colormaps["inferno"](values)[..., :3]
    assert np.abs(coloured(values) - wanted).max() < 10


@pytest.mark.parametrize("size", [(100, 200), (200, 100), (40, 41), (900, 1200), (1, 300)])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_heat_lies_on_the_square_that_the_model_sees(size, ratio):
    height, width = size
    shown = picture(np.full((height, width, 3), 200, np.uint8), ratio, np.ones((7, 7), np.float32))
    assert max(shown.shape[:2]) == 720
    dimmed = (shown == round(200 * DIMMED)).all(-1)
    scale = 720 / max(size)
    side = max(1, int(ratio * min(size))) * scale
    rows, columns = np.nonzero(~dimmed)
    for found, whole in ((rows, shown.shape[0]), (columns, shown.shape[1])):
        if whole > 2:
            assert found.max() - found.min() + 1 == pytest.approx(side, abs=1.01)
            assert (found.max() + found.min() + 1) / 2 == pytest.approx(whole / 2, abs=scale / 2 + 1.01)
    assert (shown[~dimmed] == shown[~dimmed][0]).all() and shown[~dimmed][0][0] > 200  # bright and yellow


def test_without_heat_the_square_is_the_image():
    shown = picture(np.full((100, 200, 3), 200, np.uint8), 1.0)
    assert (shown[180, 360] == 200).all() and (shown[180, 20] == 70).all()


def test_an_image_is_classified_and_explained(model):
    found = classify_one(model, image_bytes((200, 60, 30)))
    assert found.names == ("red", "green", "blue", "<b>grey</b>", "white")
    assert found.probabilities[0] > 0.99
    assert explain(model, found, 5).shape == (480, 720, 3)
    assert (explain(model, found, 5) != explain(model, found, 0)).any()


def test_classes_of_one_name_can_be_told_apart():
    twice = ModelInfo(INFO.preprocessing, ("n01", "n02", "n03"), ("crane", "dog", "crane"))
    assert shown_names(twice) == ("crane (n01)", "dog", "crane (n03)")
    assert shown_names(ModelInfo(INFO.preprocessing, ("a", "b", "a"))) == ("a (0)", "b", "a (2)")


def test_many_files_keep_their_order_and_broken_ones_are_named(model, tmp_path):
    colours = [(200, 9, 9), (9, 200, 9), (9, 9, 200)]
    contents = {f"{n:02d}.png": image_bytes(colours[n % 3]) for n in range(20)}
    contents["05.png"] = b"no image"
    contents["17.png"] = image_bytes((1, 2, 3), kind="JPEG")[:200]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    told = []
    rows = classify_many(
        model,
        [(name, tmp_path / name) for name in contents] + [("gone.png", tmp_path / "gone.png")],
        lambda done, total: told.append((done, total)),
    )
    assert [row.file for row in rows] == [*contents, "gone.png"]
    assert [row.names[0] for row in rows if not row.problem] == [
        NAMES[n % 3] for n in range(20) if n not in (5, 17)
    ]
    assert [row.file for row in rows if row.problem] == ["05.png", "17.png", "gone.png"]
    assert rows[5].problem.startswith("This is not an image") and "damaged" in rows[17].problem
    assert told == [(0, 21), (16, 21)]

    table = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [line["file"] for line in table] == [row.file for row in rows]
    assert table[0]["class_1"] == "red" and float(table[0]["probability_1"]) > 0.9 and not table[0]["problem"]
    assert table[5]["class_1"] == "" and table[5]["problem"].startswith("This is not an image")

    html = parts.table(rows)
    assert "21 files, 3 of them could not be used" in html and html.count("<tr") == 22


def test_only_broken_files_make_a_table_too(model, tmp_path):
    (tmp_path / "a").write_bytes(b"")
    rows = classify_many(model, [("a", tmp_path / "a")])
    assert as_csv(rows) == "file,class_1,probability_1,problem\na,,,The file is empty.\n"


def test_names_of_files_and_classes_are_no_formulas():
    rows = [Row("=HYPERLINK(1)", ("@class", "b"), (0.75, 0.25)), Row("-x.jpg", problem="The file is empty.")]
    first, second = csv.DictReader(io.StringIO(as_csv(rows)))
    assert (first["file"], first["class_1"], first["class_2"]) == ("'=HYPERLINK(1)", "'@class", "b")
    assert second["file"] == "'-x.jpg"


def test_names_of_files_and_classes_are_no_html(model, tmp_path):
    hostile = '<img src=x onerror="alert(1)">'
    (tmp_path / "a").write_bytes(image_bytes((9, 9, 9)))
    (tmp_path / "b").write_bytes(b"<svg>")
    rows = classify_many(model, [(hostile, tmp_path / "a"), (hostile, tmp_path / "b")])
    pieces = [
        parts.table(rows),
        parts.bars(NAMES, [0.2] * 6),
        parts.problem(hostile),
        parts.hint(hostile),
        parts.header(hostile, hostile),
        parts.facts([(hostile, hostile)]),
    ]
    for piece in pieces:
        assert "<b>grey" not in piece and "<img src=x" not in piece
    assert "&lt;b&gt;grey&lt;/b&gt;" in pieces[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.9312, "93.1%"), (0.00001, "< 0.1%"), (0.9999, "> 99.9%"), (1.0, "100.0%"), (0.5, "50.0%")],
)
def test_shares_are_not_rounded_to_certainty(value, text):
    assert parts.percent(value) == text


@pytest.mark.parametrize("name", ["o1", "it's", 'a "b"', "$(reboot)", "größe", "a/b (1)"])
def test_snippets_bear_any_name_of_a_model(name):
    import json

    snippet = curl_snippet("http://127.0.0.1:7860", name)
    # What bash hands to curl, but for the variable in the middle.
    words = shlex.split(snippet.replace("\\\n", " ").replace("'$FILE'", "FILE").split("EVENT=$(")[1])
    data = json.loads(words[words.index("-d") + 1])["data"]
    assert data == [{"path": "FILE", "meta": {"_type": "gradio.FileData"}}, name]
    tree = ast.parse(python_snippet("http://127.0.0.1:7860", name))
    assert name in [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def test_a_space_has_all_that_its_code_imports():
    """serve/page and serve/portable import each other, the standard library, and what is required."""
    allowed = {"gradio", "numpy", "PIL", "onnxruntime"} | sys.stdlib_module_names
    for path in [*(ROOT / "serve/page").glob("*.py"), *(ROOT / "serve/portable").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                ours = re.match(r"serve\.(page|portable)\b", name)
                assert ours or name.split(".")[0] in allowed, f"{path.name}: {name}"


def test_the_page_asks_nobody_for_fonts():
    for path in Path(ROOT / "serve/page").glob("*"):
        if path.suffix in (".css", ".py"):
            text = path.read_text()
            assert "GoogleFont" not in text and "@import" not in text and "url(" not in text, path
