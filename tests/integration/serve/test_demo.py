"""`python -m serve demo`: what its API answers, and what people see in a real browser."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import urllib.request

import pytest

from serve.classifier import TorchClassifier
from serve.page.snippets import curl_snippet, python_snippet
from tests.conftest import class_image
from tests.integration.serve.pages import Browser, start_demo
from tests.unit.serve.trained_run import OWN, TIMM, build_run

pytest.importorskip("gradio", reason="Gradio is not installed")


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("runs"), prepared[0]
    return build_run(folder / "first", data, TIMM, steps=15), build_run(folder / "second", data, OWN, steps=3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for label in range(3):
        class_image(label, 99, 160, 120).save(folder / f"photo {label}.png")
    (folder / "photo 1.jpg").write_text("only called an image")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(33 << 20)
    return folder


@pytest.fixture(scope="module")
def demo(runs, tmp_path_factory):
    server = start_demo(tmp_path_factory.mktemp("demo"), *map(str, runs))
    yield server
    assert server.stop() == 0, server.log
    # Gradio says so of each file that was asked for and is not a visitor's.
    assert server.log.count("Traceback") == server.log.count("InvalidPathError:"), server.log
    assert server.tried == "", "it asked other machines"
    # Nothing is left of what visitors uploaded.
    assert sorted(path.name for path in server.folder.iterdir()) == ["log.txt"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("downloads"))
    yield opened
    opened.close()


@pytest.fixture
def page(browser, demo):
    browser.open(demo.url)
    return browser


@pytest.fixture(scope="module")
def first(runs):
    return TorchClassifier(runs[0])


def answers(page):
    return page.texts("#answer .bars .name")


def test_the_curl_snippet_answers(demo, photos, first, tmp_path):
    content = (photos / "photo 2.png").read_bytes()
    (tmp_path / "photo.jpg").write_bytes(content)
    script = curl_snippet(demo.url, "first")
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("event: complete"), result
    (answer,) = json.loads(result.stdout.split("data: ", 1)[1])
    assert answer == first.classify([content])[0].as_dict()

    (tmp_path / "photo.jpg").write_bytes(b"no image")
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("event: error") and "This is not an image" in result.stdout


def test_the_python_snippet_answers(demo, photos, runs, tmp_path):
    content = (photos / "photo 0.png").read_bytes()
    (tmp_path / "photo.jpg").write_bytes(content)
    (tmp_path / "snippet.py").write_text(python_snippet(demo.url, "second"))
    result = subprocess.run(
        [sys.executable, "snippet.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    found = TorchClassifier(runs[1]).classify([content])[0]
    wanted = [f"{p:.1%} {name}" for p, name in zip(found.probabilities, found.names, strict=True)]
    assert result.stdout.splitlines()[-len(wanted) :] == wanted, result


def test_files_of_the_machine_are_not_for_visitors(demo, tmp_path, runs):
    """Neither through the API nor as a download."""
    secret = tmp_path / "secret.png"
    class_image(0, 1, 40, 40).save(secret)
    data = {"data": [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}, "first"]}
    request = urllib.request.Request(
        f"{demo.url}/gradio_api/call/classify",
        json.dumps(data).encode(),
        {"Content-Type": "application/json"},
    )
    event = json.load(urllib.request.urlopen(request, timeout=60))["event_id"]
    with urllib.request.urlopen(f"{demo.url}/gradio_api/call/classify/{event}", timeout=60) as answer:
        text = answer.read().decode()
    assert text.startswith("event: error") and "top" not in text
    for path in (secret, runs[0] / "checkpoints" / "best.pt"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{demo.url}/gradio_api/file={path}", timeout=60)
        assert caught.value.code in (403, 404)


def test_it_listens_on_this_machine_only(demo):
    assert "first" not in demo.log and f"2 models on {demo.url}" in demo.log


def test_an_image_is_classified_and_explained(page, photos, first):
    page.upload("#photo", photos / "photo 1.png")
    page.find("#seen img")
    found = first.classify([(photos / "photo 1.png").read_bytes()])[0]
    assert answers(page) == list(found.names)
    assert page.texts("#answer .bars .share")[0] == f"{100 * found.probabilities[0]:.1f}%"
    width = page.script("return document.querySelector('#answer .bar > span').getBoundingClientRect().width")
    whole = page.script("return document.querySelector('#answer .bar').getBoundingClientRect().width")
    assert width / whole == pytest.approx(found.probabilities[0], abs=0.02)

    before = page.find("#seen img").get_attribute("src")
    assert page.texts("#asked label")[:1] == [found.names[0]]
    page.all("#asked input")[2].click()
    page.wait(lambda: page.find("#seen img").get_attribute("src") != before, "the map of another class")


def test_another_model_answers_the_same_image(page, photos, runs):
    page.upload("#photo", photos / "photo 1.png")
    page.wait(lambda: answers(page), "the answer")
    before = page.texts("#answer .bars .share")
    box = page.find("#model input")
    assert box.get_attribute("value") == "first · top-1 75.00%"
    box.click()
    page.wait(lambda: [e for e in page.all("#model [role=option]") if "second" in e.text], "its name")[
        0
    ].click()
    found = TorchClassifier(runs[1]).classify([(photos / "photo 1.png").read_bytes()])[0]
    page.wait(lambda: page.texts("#answer .bars .share") != before, "another answer")
    assert answers(page) == list(found.names)
    page.tab("Model")
    page.wait(lambda: "residual_cnn" in "".join(page.texts("#facts")), "the other network")


def test_what_is_no_image_is_told_politely(page, photos):
    page.upload("#photo", photos / "photo 1.jpg")
    page.wait(
        lambda: (
            page.texts("#answer [role=alert]")
            == ["This is not an image: send JPEG, PNG, GIF, BMP, TIFF, WEBP, PPM."]
        )
    )
    assert not page.all("#seen img") and not page.all("#answer .bars")
    page.open(page.driver.current_url)
    page.upload("#photo", photos / "huge.png")
    page.wait(
        lambda: page.texts("#answer [role=alert]") == ["The file is larger than 32 MiB: make it smaller."]
    )


def test_an_example_of_the_data_set_can_be_tried(page):
    page.find("#examples button, #examples .gallery-item").click()
    page.wait(lambda: answers(page), "the answer")
    assert len(page.all("#examples img")) == 4  # one a class


@pytest.mark.parametrize("argument", [0, 1])
def test_the_demo_fetches_no_address_that_a_caller_names(demo, argument):
    named = {"path": "https://example.com/photo.jpg", "meta": {"_type": "gradio.FileData"}}
    data = [None, "first"]
    data[argument] = named
    call = f"{demo.url}/gradio_api/call/classify"
    request = urllib.request.Request(
        call, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=60) as answer:
        told = answer.read().decode()
    assert "event: error" in told and "Send the file itself: this page fetches nothing." in told
    assert demo.tried == ""


def test_many_images_become_a_table_and_a_csv(page, photos, first):
    page.tab("Many images")
    files = [photos / name for name in ("photo 0.png", "photo 1.jpg", "photo 2.png")]
    page.upload("#files", *files)
    page.wait(lambda: len(page.all("#table tbody tr")) == 3, "the table")
    assert page.texts("#table .count") == ["3 files, 1 of them could not be used"]
    assert page.texts("#table .file") == [path.name for path in files]
    wanted = [first.classify([files[n].read_bytes()])[0].names[0] for n in (0, 2)]
    assert page.texts("#table .class b") == wanted
    assert page.texts("#table .why")[0].startswith("This is not an image")

    page.find("#csv").click()
    saved = page.downloads / "predictions.csv"
    page.wait(lambda: saved.exists(), "the CSV")
    lines = list(csv.DictReader(io.StringIO(saved.read_text())))
    assert [line["file"] for line in lines] == [path.name for path in files]
    assert [line["class_1"] for line in lines] == [wanted[0], "", wanted[1]]


def test_the_snippets_name_this_page(page, demo):
    page.tab("API")
    page.wait(lambda: demo.url in "".join(page.texts("#curl")), "the address in curl's snippet")
    page.wait(lambda: demo.url in "".join(page.texts("#python")), "the address in Python's snippet")


@pytest.mark.parametrize(("width", "mode"), [(400, "dark"), (400, "light"), (1280, "dark")])
def test_nothing_is_wider_than_the_screen(browser, demo, photos, width, mode):
    browser.requests()
    browser.open(demo.url, width, mode)
    browser.upload("#photo", photos / "photo 1.png")
    browser.find("#seen img")
    for tab in ("One image", "Many images", "API", "Model"):
        browser.tab(tab)
        assert browser.script("return document.documentElement.scrollWidth") <= width, tab
    background = browser.script("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 20, 26)" if mode == "dark" else "rgb(244, 246, 248)")
    foreign = [url for url in browser.requests() if not url.startswith((demo.url, "data:", "blob:"))]
    assert foreign == []
