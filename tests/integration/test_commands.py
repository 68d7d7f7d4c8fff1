"""README's commands, the make targets and the demo script, run as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.__main__ import _parser as command_line
from data_prep.manifest import Manifest
from tests.conftest import ROOT, write_image_folder
from tests.integration.launch import environment, read_json

README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's code (linked), a tiny stand-in for the demo's data, and a shorter recipe."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("data_prep", "train", "evaluation", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    recipe = yaml.safe_load((folder / "configs" / "demo.yaml").read_text())
    recipe["model"]["name"] = "test_resnet"
    recipe["data"] |= {"resolution": 32, "num_workers": 0}
    recipe["schedule"]["phases"][0]["epochs"] = 1
    recipe["lr_finder"]["num_steps"] = 20
    (folder / "configs" / "demo.yaml").write_text(yaml.safe_dump(recipe))
    write_image_folder(folder / "data" / "synthetic-source", num_classes=4, num_train=40, num_val=10)
    return folder


def shell(words: list[str], folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    bin_folder = str(Path(sys.executable).parent)
    variables = environment() | {"PATH": f"{bin_folder}:{os.environ['PATH']}"} | extra
    return subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=400)


def test_readme_commands_work_in_order(workplace: Path) -> None:
    # Those of serving are run by tests of its own: one of them serves without end.
    commands = [c for c in readme_commands() if c.startswith(("python", "torchrun")) and "-m serve" not in c]
    assert len(commands) == 9
    for command in commands:
        if "nproc-per-node=gpu" in command:
            continue  # needs a GPU; the same command with two ranks stands above it
        result = shell(command.split(), workplace)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert (workplace / "runs" / "mine" / "report" / "report.html").is_file()
    assert "| mine |" in (workplace / "logs.md").read_text()


def test_documented_data_prep_commands_have_these_options() -> None:
    text = (ROOT / "docs" / "data_preparation.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"-m data_prep ([^#`\n]*)", text)
    assert len(commands) >= 6
    for command in commands:
        assert callable(command_line().parse_args(command.split()).run)


def test_readme_make_targets_exist() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"make ([a-z][a-z-]+)", README):
        assert f"make {target} " in listed, target


@pytest.mark.long
def test_demo_goes_through_and_then_counts_up(workplace: Path, tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "my pictures", num_classes=3, num_train=30, num_val=8)
    words = [sys.executable, "scripts/demo.py", "--source", str(source)]
    first = shell(words, workplace, PYTHONPATH=".")
    assert first.returncode == 0, first.stdout + first.stderr
    folder = workplace / "runs" / "demo-my-pictures"
    assert read_json(folder / "summary.json")["world_size"] == 2
    summary = first.stdout.split("── Summary")[1]
    for label in ("top-1 / top-5", "images/s", "time", "cost", "checkpoint", "report", "make ui"):
        assert label in summary
    assert "recognised" in first.stdout and "as image-folder" in first.stdout
    # The next one has a name of its own; what its recipe lacks ends it before the training.
    again = shell([*words, "model.name=resnet81"], workplace, PYTHONPATH=".")
    assert again.returncode == 1 and "no model 'resnet81'" in again.stderr, again.stdout + again.stderr
    assert "-m train check" in again.stdout and "run.name=demo-my-pictures-2" in again.stdout
    assert "── Training" not in again.stdout and not (workplace / "runs" / "demo-my-pictures-2").exists()


@pytest.mark.parametrize(
    ("make_source", "sentence"),
    [
        (lambda folder: folder / "nowhere", "does not exist"),
        (lambda folder: (folder / "empty" / "a").mkdir(parents=True) or folder / "empty", "no known layout"),
    ],
)
def test_demo_stops_at_bad_sources_with_one_sentence(
    workplace: Path, tmp_path: Path, make_source, sentence: str
) -> None:  # type: ignore[no-untyped-def]
    words = [sys.executable, "scripts/demo.py", "--source", str(make_source(tmp_path))]
    result = shell(words, workplace, PYTHONPATH=".")
    assert result.returncode == 1 and sentence in result.stderr and "Traceback" not in result.stderr


def test_without_ffcv_and_dali_the_reference_loader_goes_on(
    prepared: tuple[Path, Manifest], workplace: Path, tmp_path: Path
) -> None:
    # A package that fails to import, as a build against a missing library does.
    (tmp_path / "ffcv").mkdir()
    (tmp_path / "ffcv" / "__init__.py").write_text("raise ImportError('libopencv_core.so.406: cannot open')")
    (tmp_path / "nvidia").mkdir()  # DALI is in a package of that name: with this one, there is none
    (tmp_path / "nvidia" / "__init__.py").write_text("")
    words = [sys.executable, "-m", "train", "configs/demo.yaml", f"data.path={prepared[0]}", "run.name=plain"]
    words += ["lr_finder.enabled=false", "lr_finder.use=false", "tracking.mlflow=false"]
    result = shell(words, workplace, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "loader reference (" in result.stdout and "DALI is not installed" in result.stdout
    assert "FFCV does not import (libopencv_core.so.406" in result.stdout


def test_setup_script_is_sound() -> None:
    script = str(ROOT / "scripts" / "setup.sh")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK) and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_no_document_names_a_registry() -> None:
    for name in ("README.md", "constraints.txt", "pyproject.toml", "CONTRIBUTING.md", "scripts/setup.sh"):
        assert not re.search(r"pypi\.org|pythonhosted|deb\.debian", (ROOT / name).read_text())
