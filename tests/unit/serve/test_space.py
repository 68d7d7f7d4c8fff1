"""The texts of a Space, what is written where, and what goes to the Hub."""

from __future__ import annotations

import ast
import json
import tomllib

import pytest
import yaml

from serve.model_folder import CARD_NAME
from serve.portable.model_info import ModelInfo
from serve.portable.preprocessing import Preprocessing
from serve.space.push import check_name, push_space
from serve.space.texts import app_text, card_of, readme_text, requirements_text
from tests.conftest import ROOT

INFO = ModelInfo(Preprocessing(32, 1.0, (0.5,) * 3, (0.25,) * 3), ("a", "b"))
HOSTILE = 'A "title": {x}\n---\nsdk: docker'


@pytest.mark.parametrize("title", ["Scenes", "Größe: 3", HOSTILE])
def test_the_hub_reads_the_front_matter(title):
    text = readme_text(INFO, title, "A sentence.", "mit", "## Card\n")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["title"] == title and front["sdk"] == "gradio" and front["app_file"] == "app.py"
    assert front["license"] == "mit" and len(front["short_description"]) <= 60
    assert f"gradio=={front['sdk_version']}" in requirements_text()
    assert text.endswith("---\n\n## Card\n")


@pytest.mark.parametrize("title", ["Scenes", HOSTILE, "it's {title}"])
def test_titles_are_texts_in_the_app(title):
    tree = ast.parse(app_text(title, "Sentence"))
    values = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert values == {"TITLE": title, "SENTENCE": "Sentence"}


def test_requirements_are_pinned_to_what_is_installed_and_tested():
    lines = requirements_text().splitlines()
    assert [line.split("==")[0] for line in lines] == ["gradio", "numpy", "onnxruntime", "pillow"]
    assert all("==" in line for line in lines)


def test_stylesheets_are_installed_with_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "*.css" in data["serve.page"]


def test_a_card_loses_its_own_front_matter(tmp_path):
    assert card_of(tmp_path) == ""
    (tmp_path / CARD_NAME).write_text("---\ntags: [x]\n---\n# Model\n\ntext\n\n## Use\n")
    assert card_of(tmp_path) == "## Model\n\ntext\n\n### Use\n"


@pytest.mark.parametrize("name", ["mine", "../a/b", "a/b/c", "a b/c", ""])
def test_names_on_the_hub(name):
    with pytest.raises(ValueError, match="USER/NAME"):
        check_name(name)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    from serve.space.folder import write_space

    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis.tex, which is no part of a Space"):
        write_space(tmp_path / "run", tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        write_space(tmp_path / "run", tmp_path / "thesis.tex")


def test_a_push_makes_a_private_space(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Api:
        def __init__(self, **options):
            pass

        def create_repo(self, name, **options):
            calls.append((name, options))

        def upload_folder(self, **options):
            calls.append(("upload", options))

    monkeypatch.setattr(hub, "HfApi", Api)
    assert push_space(tmp_path, "me/mine", private=True) == "https://huggingface.co/spaces/me/mine"
    (name, made), (_, uploaded) = calls
    assert name == "me/mine" and made["private"] is True and made["repo_type"] == "space"
    assert made["space_sdk"] == "gradio" and uploaded["folder_path"] == tmp_path
    assert uploaded["repo_type"] == "space" and uploaded["repo_id"] == "me/mine"


@pytest.mark.parametrize(("status", "sentence"), [(401, "HF_TOKEN"), (403, "may not write"), (500, "later")])
def test_the_hubs_refusals_are_one_sentence(tmp_path, monkeypatch, status, sentence):
    """Against a real HTTP server in place of the Hub."""
    pytest.importorskip("huggingface_hub")
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    import huggingface_hub

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            content = json.dumps({"error": "no"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_secret_token")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: made)
    try:
        with pytest.raises(ValueError, match=sentence) as caught:
            push_space(tmp_path, "me/mine", private=True)
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(caught.value) and "hf_secret" not in str(caught.value)


def test_without_a_token_the_commands_are_named(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    made = hub.HfApi(endpoint="http://127.0.0.1:9", token=True)
    monkeypatch.setattr(hub, "HfApi", lambda **_: made)
    with pytest.raises(ValueError, match="hf auth login"):
        push_space(tmp_path, "me/mine", private=True)
