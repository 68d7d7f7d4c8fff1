"""The quickstart notebook: what is stored of it, and all its cells on a tiny data set."""

from __future__ import annotations

import json
import re
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
SETTINGS = ["model.name=test_resnet", "data.resolution=32", "validation.resolution=32", "data.num_workers=0"]
SETTINGS += ["schedule.phases=[{kind: one_cycle, epochs: 1}]", "lr_finder.enabled=false", "lr_finder.use=false"]
SETTINGS += ["tracking.mlflow=false", "run.preflight=false", "precision.mode=fp32"]
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
    assert [name for name, cell in cells.items() if "parameters" in cell.metadata.get("tags", [])] == ["parameters"]


def test_the_stored_notebook_names_no_machine() -> None:
    for cell in read_notebook().cells:
        # Colab's own folder is the same for everybody, and named in the text only.
        text = cell.source if cell.cell_type == "code" else cell.source.replace("/content/", "")
        assert not re.search(r"""["'`\s(=](/|~/|[A-Z]:\\\\)\w+""", text), cell.id
        assert "://" not in text, cell.id


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
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(workplace / "notebooks")}}
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
