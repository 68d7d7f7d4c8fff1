"""The container's files by themselves: what the Dockerfile copies is enough, and its packages are ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

FOLDER = ROOT / "serve" / "http"


def pins(path: Path) -> dict[str, str]:
    rows = [row.strip() for row in path.read_text().splitlines() if row.strip() and not row.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (r.split("==") for r in rows)}


def test_every_package_is_pinned_as_everywhere_here() -> None:
    own, everywhere = pins(FOLDER / "requirements.txt"), pins(ROOT / "constraints.txt")
    assert own == {name: everywhere[name] for name in own}
    assert {"onnxruntime", "fastapi", "uvicorn", "pillow", "numpy", "h11"} <= set(own)
    assert not {"torch", "mlflow", "timm", "gradio"} & set(own)


def test_what_the_dockerfile_copies_is_enough(tmp_path: Path) -> None:
    text = (FOLDER / "Dockerfile").read_text()
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    for row in re.findall(r"^COPY (serve.*)$", text, re.M):
        *sources, target = row.split()
        for source in sources:
            assert f"!{source}" in ignored or source.startswith("serve/http/")
            if target.endswith(".txt"):
                continue
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target)
            else:
                (tmp_path / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / target)
    code = (
        "import runpy, sys; sys.path.insert(0, '.'); sys.argv[1:] = ['http', '--help']\n"
        "import serve.http.server\n"
        "import os; assert os.path.realpath(serve.__file__).startswith(os.getcwd()), serve.__file__\n"
        "assert 'torch' not in sys.modules\n"
        "runpy.run_module('serve', run_name='__main__')"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0 and "--max-batch" in finished.stdout, finished.stderr


def test_the_image_is_not_root_and_knows_its_health() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    last = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER 65534:65534$", last, re.M) and "/healthz/live" in last
    assert not re.search(r"^ADD |:latest|curl|apt-get|SECRET|API_KEY=", text, re.M)
