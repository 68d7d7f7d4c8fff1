"""mlflow.json and the rows that MLflow gets, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.tracking.metrics_file import MetricsFile
from train.tracking.mlflow_replay import _version
from train.tracking.mlflow_rows import KnownRows, RowFile, as_row
from train.tracking.mlflow_state import load_wanted, open_state

URI = "http://127.0.0.1:5000"


class Nothing(KnownRows):
    """A server without a row."""

    def __init__(self) -> None:
        super().__init__(self, "")  # type: ignore[arg-type]

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return []


def row(step: int, split: str = "train") -> dict[str, Any]:
    return {"step": step, "epoch": step / 10, "split": split, "loss": 0.5, "top1": 0.25, "time": 5.0 + step}


def test_row_names() -> None:
    train = as_row(row(3) | {"learning_rate": 0.1, "resolution": 64, "mfu": None})
    assert train is not None and (train.step, train.timestamp) == (3, 8000)
    assert train.metrics == {"epoch": 0.3, "learning_rate": 0.1, "train_loss": 0.5, "train_top1": 0.25}
    other = as_row(row(3, "val:ema"))
    assert other is not None and other.metrics == {"val_ema_loss": 0.5, "val_ema_top1": 0.25}
    assert as_row({"step": 1}) is None and as_row([]) is None and as_row(row(1) | {"step": "x"}) is None


def test_rows_are_read_while_they_are_written_and_cut_back(tmp_path: Path) -> None:
    path, known = tmp_path / "metrics.jsonl", Nothing()
    rows = RowFile(path)
    assert rows.read(known) == []
    file = MetricsFile(path)
    for step in range(500):
        file.append(row(step))
    with path.open("a") as torn:
        torn.write('{"step": 500, "spl')
    got: list[int] = []
    while some := rows.read(known):
        assert rows.read(known) == some  # not sent yet: the same again
        assert sum(len(r.metrics) for r in some) <= 1000  # what MLflow takes
        got += [r.step for r in some]
        known.add(some)
        rows.advance()
    assert got == list(range(500))
    file.cut_to(101)
    for step in range(101, 502):  # trained again, and two steps on
        file.append(row(step))
    assert [r.step for r in rows.read(known)] == [500, 501]


def test_a_step_that_stands_twice_goes_out_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 2, 1, 3):
        file.append(row(step))
    assert [r.step for r in RowFile(tmp_path / "metrics.jsonl").read(Nothing())] == [1, 2, 3]


def test_state_survives_and_another_server_begins_anew(tmp_path: Path) -> None:
    state = open_state(tmp_path, URI, "x")
    state.add_figures({"peak_lr": 0.1}, 0)
    state.add_figures({"peak_lr": 0.1}, 0)
    state.wanted.run_id, state.wanted.figures[0][4] = "abc", True
    (tmp_path / "a.txt").write_text("a")
    state.add_file(tmp_path / "a.txt", None)
    state.save()
    same = open_state(tmp_path, URI.replace("//", "//me:secret@"), "x", "another")
    assert same.wanted.run_id == "abc" and same.wanted.key == state.wanted.key
    assert len(same.wanted.figures) == 1 and same.wanted.figures[0][4]
    other = open_state(tmp_path, URI, "y", "another")
    assert other.wanted.run_id is None and not other.wanted.figures[0][4]
    (tmp_path / "mlflow.json").unlink()
    assert open_state(tmp_path, URI, "x", "abc").wanted.run_id == "abc"
    assert open_state(tmp_path, URI, "x", f"key:{state.wanted.key}").wanted.key == state.wanted.key


@pytest.mark.parametrize(
    "change",
    [
        {"key": "' or '1' = '1"},
        {"key": 5},
        {"files": {"a": 1}},
        {"figures": [[1]]},
        {"unknown": 1},
        {"children": 3},
        {"tags": None},
    ],
)
def test_a_file_that_is_none_of_ours_is_not_used(tmp_path: Path, change: dict[str, Any]) -> None:
    open_state(tmp_path, URI, "x").save()
    path = tmp_path / "mlflow.json"
    assert load_wanted(tmp_path) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load_wanted(tmp_path) is None
    path.write_text("[" * 10_000)
    assert load_wanted(tmp_path) is None


def test_files_outside_the_folder_are_never_sent(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "mine").write_text("m")
    (folder / "link").symlink_to(tmp_path / "secret")
    assert _version(folder / "mine", folder) is not None
    for name in ("link", "../secret", "/etc/hostname", "gone", "."):
        assert _version(folder / name, folder) is None


def test_a_disk_that_refuses_the_file_stops_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    state = open_state(folder, URI, "x")
    (folder / "mlflow.json").mkdir()  # root may write everywhere, but not over a folder
    state.add_tags({"a": "b"})
    state.save()
    assert state.fault is not None and "mlflow.json cannot be written" in state.fault
    (folder / "mlflow.json").rmdir()
    state.save()
    assert state.fault is None and load_wanted(folder) is not None


def test_ui_is_for_this_machine_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts import ui

    started: list[Any] = []
    monkeypatch.setattr("os.execve", lambda *words: started.append(words))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@db/x")
    for words in ([], ["--host", "0.0.0.0"]):
        monkeypatch.setattr("sys.argv", ["ui.py", "--runs", str(tmp_path), *words])
        ui.main()
    hosts = [command[command.index("--host") + 1] for _, command, _ in started]
    assert hosts == ["127.0.0.1", "0.0.0.0"]
    assert all("secret" not in " ".join(command) for _, command, _ in started)
    assert started[0][2]["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:secret@db/x"
    assert "secret" not in capsys.readouterr().out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host")
    assert ui.main() == 1 and "secret" not in capsys.readouterr().err
