"""`python -m serve space`: the folder runs alone, without torch, this project or anybody else."""

from __future__ import annotations

import io
import json
import subprocess
import urllib.request
from contextlib import redirect_stdout

import pytest

from serve.__main__ import main
from serve.classifier import TorchClassifier
from serve.demo.torch_model import open_shown
from serve.portable.limits import Limits
from tests.conftest import class_image
from tests.integration.mlflow_server import free_port
from tests.integration.serve.pages import PageServer
from tests.unit.serve.trained_run import TIMM, build_run

for package in ("gradio", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason=f"{package} is not installed")
OURS = "torch,torchvision,timm,train,data_prep,evaluation,infra,mlflow,tests,scipy,cv2,pydantic_settings"


@pytest.fixture(scope="module")
def made(prepared, tmp_path_factory):
    """(the run, its Space), written over an older one."""
    folder = tmp_path_factory.mktemp("space")
    source = build_run(folder / "first", prepared[0], TIMM, steps=15)
    (folder / "photos").mkdir()
    class_image(1, 5, 90, 60).save(folder / "photos" / "stripes.png")
    (folder / "photos" / "notes.txt").write_text("no image")
    space = folder / "space"
    (space / "model").mkdir(parents=True)
    (space / "model" / "old.onnx").write_text("of the last time")
    words = ["space", str(source), "--out", str(space), "--title", "Stripes"]
    with redirect_stdout(io.StringIO()) as said:  # in this process, which has done the imports
        assert main([*words, "--examples", str(folder / "photos")]) == 0
    assert "a Space of" in said.getvalue() and "without maps" not in said.getvalue()
    return source, space


def test_the_folder_is_complete(made):
    _, space = made
    assert sorted(path.name for path in space.iterdir()) == [
        "README.md",
        "app.py",
        "examples",
        "model",
        "requirements.txt",
        "serve",
    ]
    assert sorted(path.name for path in (space / "model").iterdir()) == ["model.onnx", "preprocessing.json"]
    assert [path.name for path in (space / "examples").iterdir()] == ["stripes.png"]
    text = "".join(path.read_text(errors="replace") for path in space.rglob("*.*") if path.suffix != ".onnx")
    assert str(space.parent) not in text, "it tells of folders of this machine"


def test_it_runs_alone_and_answers_as_the_checkpoint(made, tmp_path):
    source, space = made
    class_image(2, 77, 120, 90).save(tmp_path / "photo.png")
    # The `serve` of this project must not be what runs.
    server = PageServer(tmp_path, [str(space / "app.py")], free_port(), forbidden=OURS)
    try:
        upload = f"curl -sf -F files=@{tmp_path}/photo.png {server.url}/gradio_api/upload"
        (path,) = json.loads(subprocess.run(upload.split(), capture_output=True, timeout=60).stdout)
        data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "Stripes"]}
        address = f"{server.url}/gradio_api/call/classify"
        request = urllib.request.Request(
            address, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        event = json.load(urllib.request.urlopen(request, timeout=60))["event_id"]
        with urllib.request.urlopen(f"{address}/{event}", timeout=60) as answer:
            top = json.loads(answer.read().decode().split("data: ", 1)[1])[0]["top"]
        config = urllib.request.urlopen(f"{server.url}/config", timeout=60).read().decode()
    finally:
        server.stop()
    assert "Traceback" not in server.log and server.tried == ""
    assert "stripes.png" in config
    found = TorchClassifier(source).classify([(tmp_path / "photo.png").read_bytes()])[0]
    assert [entry["name"] for entry in top] == list(found.names)
    assert [entry["probability"] for entry in top] == pytest.approx(found.probabilities, abs=1e-4)


def test_its_maps_are_those_of_the_demo(made):
    source, space = made
    of_run, of_space = open_shown(source, Limits()), open_shown(space / "model", Limits())
    prepared = of_run.classifier.prepare((space / "examples" / "stripes.png").read_bytes())
    for label in range(4):
        # The demo's maps are enlarged to the image; a cell that is highest stays where it is.
        large, small = of_run.heat(prepared, label), of_space.heat(prepared, label)
        assert large.any() == small.any()
        row, column = divmod(int(small.argmax()), small.shape[1])
        scale = large.shape[0] / small.shape[0]
        middle = large[int((row + 0.5) * scale), int((column + 0.5) * scale)]
        assert middle > 0.9 or not small.any()


def test_a_folder_with_something_else_stays(made, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["space", str(made[0]), "--out", str(tmp_path)]) == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
