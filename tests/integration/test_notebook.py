"""The quickstart notebook: what is stored of it, and all its cells on a tiny data set."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.integration.launch import environment, read_json

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
MAX_CODE_CELLS = 14
TINY = """
NUM_IMAGES = 160
SETTINGS = ["model.name=test_resnet", "data.resolution=32", "validation.resolution=32"]
SETTINGS += ["schedule.phases=[{kind: one_cycle, epochs: 1}]", "lr_finder={enabled: false, use: false}"]
SETTINGS += ["data.loader=reference", "data.num_workers=0", "run.preflight=false"]
SETTINGS += ["tracking.mlflow=false", "precision.mode=fp32"]
"""
SHOWN = """
import json
print(json.dumps({"top1": top1, "summary": summary, "num_images": len(images), "num_rows": len(rows)}))
"""


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> dict[str, Any]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def text_of(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_the_stored_notebook_is_valid_short_and_empty() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert next(iter(cells)) == "install" and '"pip", "install"' in cells["install"].source
    assert len(cells) <= MAX_CODE_CELLS
    for name, cell in cells.items():
        assert cell.outputs == [] and cell.execution_count is None, name
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE), f"{name}: a failed ! line goes on"
    assert [name for name, cell in cells.items() if "parameters" in cell.metadata.get("tags", [])] == [
        "parameters"
    ]


def test_the_stored_notebook_names_no_machine() -> None:
    for cell in read_notebook().cells:
        # Colab's own folder is the same for everybody, and named in the text only.
        text = cell.source if cell.cell_type == "code" else cell.source.replace("/content/", "")
        assert not re.search(r"""["'`\s(=](/|~/|[A-Z]:\\\\)\w+""", text), cell.id
        assert "://" not in text, cell.id


def run_install_cell(folder: Path, before: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
    source = code_cells(read_notebook())["install"].source
    for old, new in changes.items():
        source = re.sub(rf"^{old} = .*$", f"{old} = {new!r}", source, flags=re.MULTILINE)
    words = [sys.executable, "-c", before + source]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)


def test_without_a_checkout_the_first_cell_asks_for_the_repository(tmp_path: Path) -> None:
    result = run_install_cell(tmp_path)
    assert result.returncode == 1 and "set REPOSITORY to the address" in result.stderr
    assert not any(tmp_path.iterdir())


def test_the_first_cell_clones_and_installs_only_what_is_missing(tmp_path: Path) -> None:
    origin, elsewhere = tmp_path / "origin", tmp_path / "elsewhere"
    for name in ("data_prep/__init__.py", "configs/demo.yaml"):
        (origin / name).parent.mkdir(parents=True)
        (origin / name).touch()
    (origin / "constraints.txt").write_text("# pins\nTorch==0.0.1\nnot_here==1.0\n")
    # Found before pip itself, as the clone is the working folder: nothing is really installed.
    (origin / "pip.py").write_text("import sys; print(sys.argv[1:])")
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    elsewhere.mkdir()
    nothing_there = "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
    result = run_install_cell(elsewhere, nothing_there, REPOSITORY=str(origin))
    clone = elsewhere / "imagenet-sprint"
    assert result.returncode == 0 and f"the project is in {clone}" in result.stdout, result.stderr
    assert "'--constraint', '.setup/missing.txt', '--editable', '.[augment]'" in result.stdout
    assert (clone / ".setup" / "missing.txt").read_text() == "# pins\nnot_here==1.0"
    everything_there = nothing_there.replace("None", "name")
    again = run_install_cell(elsewhere, everything_there)  # as after a restart of the session
    assert again.returncode == 0 and "install" not in again.stdout


@pytest.fixture
def run_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The notebook's `run`, its working folder an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the cell would set, too
    names: dict[str, Any] = {"os": os, "re": re, "subprocess": subprocess, "sys": sys, "Path": Path}
    names |= {"NAME": "quickstart", "RUNS": "runs"}
    exec(code_cells(read_notebook())["helpers"].source, names)
    return names["run"]


def test_a_failed_command_stops_the_cell_with_its_own_sentence(run_helper: Callable[..., None]) -> None:
    with pytest.raises(RuntimeError, match=r"^error: .*nowhere.* does not exist"):
        run_helper("-m", "data_prep", "prepare", "--source", "nowhere", "--out", "data")
    with pytest.raises(RuntimeError, match="exit code 3"):
        run_helper("-c", "raise SystemExit(3)")


def test_a_stop_reaches_the_command_which_may_still_save(
    run_helper: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "import os, signal, time\n"
        "try:\n os.kill(os.getppid(), signal.SIGINT); time.sleep(60)\n"
        "except KeyboardInterrupt: print('saved')\n"
    )
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    try:
        with pytest.raises(KeyboardInterrupt, match="run the cell again"):
            run_helper("-c", command)
    finally:
        signal.signal(signal.SIGINT, former)
    assert "\nsaved\n" in capsys.readouterr().out


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of one's own: the project's code, linked, with an empty data/ and runs/."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "data_prep", "evaluation", "train"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "notebooks").mkdir()
    return folder


def execute(notebook: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)  # the kernel inherits them
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(workplace / "notebooks")}},
    )
    return client.execute(**options)


def test_all_cells_run_in_order(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read_notebook()
    code_cells(notebook)["parameters"].source += TINY
    notebook.cells.append(nbformat.v4.new_code_cell(SHOWN, id="shown"))
    cells = code_cells(execute(notebook, workplace, monkeypatch))
    folder = workplace / "runs" / "quickstart"
    assert (folder / "report" / "report.html").is_file()
    shown, summary = json.loads(text_of(cells["shown"])), read_json(folder / "summary.json")
    assert shown["summary"] == summary
    assert shown["top1"] == pytest.approx(summary["best_top1"])
    assert read_json(folder / "report" / "report.json")["top1"] == pytest.approx(shown["top1"])
    assert shown["num_images"] == 24 and shown["num_rows"] > 0
    for name in ("look", "schedule", "curves", "evaluate", "grid"):
        pictures = [output for output in cells[name].outputs if "image/png" in output.get("data", {})]
        assert pictures, f"{name} shows no picture"
    # The commands that are shown are those of the README, and all of their output is there.
    assert "$ torchrun --standalone --nproc-per-node=1 -m train configs/demo.yaml" in text_of(cells["train"])
    assert "finished: final top-1" in text_of(cells["train"])
    assert "quarantined" in text_of(cells["prepare"])
