"""A supervised command: its log, its end, and that nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from infra.node.process import Ended, last_words, supervise
from tests.conftest import ROOT


def run(tmp_path: Path, code: str, **options: Any) -> Ended:
    settings: dict[str, Any] = {
        "folder": tmp_path,
        "environment": os.environ,
        "stop_for": lambda: None,
        "poll_seconds": 0.01,
        "stop_seconds": 0.5,
    }
    return supervise([sys.executable, "-c", code], tmp_path / "log", **settings | options)


def test_it_tells_code_and_last_words(tmp_path: Path) -> None:
    ended = run(tmp_path, "print('error: of before'); raise SystemExit(3)")
    assert ended == Ended(3, None, "error: of before")
    # Of this start only; and the error rather than what follows it.
    assert (
        run(tmp_path, "print('error (rank 0): why\\n error_file: <N/A>\\ntraceback')").last_words
        == "error (rank 0): why"
    )
    assert run(tmp_path, "pass").last_words == ""
    missing = supervise(
        ["/nowhere/torchrun"],
        tmp_path / "log",
        folder=tmp_path,
        environment={"PATH": "/nowhere"},
        stop_for=lambda: None,
        poll_seconds=0.01,
        stop_seconds=0.1,
    )
    assert missing.code == 127 and "/nowhere/torchrun" in missing.last_words


def test_a_reason_stops_it_gently_then_by_force(tmp_path: Path) -> None:
    gentle = (
        "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(0)); open('up','w'); time.sleep(60)"
    )
    ended = run(tmp_path, gentle, stop_for=lambda: "deadline" if (tmp_path / "up").exists() else None)
    assert ended.code == 0 and ended.stopped_for == "deadline"
    (tmp_path / "up").unlink()
    deaf = "import signal,time; signal.signal(15, signal.SIG_IGN); open('up','w'); time.sleep(60)"
    ended = run(tmp_path, deaf, stop_for=lambda: "signal" if (tmp_path / "up").exists() else None)
    assert ended.code == -9 and ended.stopped_for == "signal"


def test_it_is_bounded_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    ended = run(tmp_path, "import time; time.sleep(60)", timeout_seconds=0.2)
    assert ended.stopped_for == "timeout" and time.monotonic() - began < 30


def test_children_that_outlive_it_are_ended(tmp_path: Path) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    ended = run(tmp_path, code)
    pid = int(ended.last_words)
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_it_ends_when_whoever_supervises_is_killed(tmp_path: Path) -> None:
    """As when the agent runs out of memory: nobody would stop the training, or heed the deadline."""
    child = "import os,time; open('pid','w').write(str(os.getpid())); time.sleep(60)"
    code = f"""
import os, sys
from pathlib import Path
from infra.node.process import supervise
supervise([sys.executable, "-c", {child!r}], Path("log"), folder=Path("."), environment=os.environ,
          stop_for=lambda: None, poll_seconds=0.01, stop_seconds=1)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    until = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_passwords_are_not_logged(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-secret")
    ended = run(tmp_path, "print('error: http://me:other-secret@host said a-long-secret')")
    assert "secret" not in ended.last_words.replace("***", "")
    assert "a-long-secret" not in last_words(tmp_path / "log")
