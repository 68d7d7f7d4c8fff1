"""Disks that are full, read-only or forbidden, too few files to open: a sentence, and nothing lost."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from tests.integration.launch import command, environment, read_json, run, start, write_recipe
from tests.integration.test_training import wait_for_step
from train.checkpoint import load_checkpoint
from train.tracking.metrics_file import read_metrics


def mount(*words: str) -> bool:
    return shutil.which("mount") is not None and subprocess.run(["mount", *words]).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not mount("-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)):
        pytest.skip("needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all that is free."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(64)):
            pass
    return path


def keep_full(ballast: Path, process: subprocess.Popen[str]) -> None:
    """Take at once what the training frees by deleting older checkpoints."""
    while process.poll() is None:
        with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass


def read_until(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> str:
    """Output up to the first line that is wanted."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if wanted(line):
            return said
    raise AssertionError(said)


MANY_EPOCHS = "schedule.phases=[{kind: constant, epochs: 400}]"
FREQUENT = ("checkpoint.every_steps=3", "data.global_batch_size=8", "run.log_every_steps=1")


def test_training_goes_on_while_the_disk_takes_nothing(
    prepared: tuple[Path, Manifest], small_disk: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, prepared[0])
    folder = small_disk / "run"
    process = start(
        "train", str(recipe), f"run.folder={small_disk}", "run.name=run", MANY_EPOCHS, *FREQUENT, num_ranks=2
    )
    wait_for_step(folder, 20, process)
    ballast = fill(small_disk)
    said = read_until(process, lambda line: "is full: free some space" in line)
    assert "; that of step " in said.splitlines()[-1] and " stands" in said.splitlines()[-1]
    if "takes no rows" not in said:
        read_until(process, lambda line: "takes no rows" in line)
    time.sleep(1)  # it trains on
    ballast.unlink()
    read_until(process, lambda line: "takes rows again, none is lost" in line)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert read_json(folder / "status.json") == {"status": "restart", "reason": "SIGTERM"}, output
    steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if row["split"] == "train"]
    assert steps == list(range(1, steps[-1] + 1))  # not one row was lost
    names = sorted(path.name for path in (folder / "checkpoints").glob("step-*.pt"))
    assert load_checkpoint(folder / "checkpoints" / names[-1])["progress"]["step"] == steps[-1]


@pytest.mark.long
def test_a_disk_that_stays_full_ends_in_a_sentence_and_the_run_can_go_on(
    prepared: tuple[Path, Manifest], small_disk: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, prepared[0])
    folder = small_disk / "run"
    words = ("train", str(recipe), f"run.folder={small_disk}", "run.name=run", MANY_EPOCHS, *FREQUENT)
    process = start(*words)
    wait_for_step(folder, 20, process)
    ballast = fill(small_disk)
    threading.Thread(target=keep_full, args=(ballast, process), daemon=True).start()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=90)[0]
    assert process.returncode == 1 and "the last checkpoint could not be written" in output, output
    assert "is full: free some space" in output and "Traceback" not in output
    ballast.unlink()
    again = run(*words, "budget.max_usd=0.0001")
    assert again.returncode == 0 and "going on from step-" in again.stdout, again.stdout + again.stderr


def test_too_few_open_files_and_no_permission_are_sentences(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, prepared[0], **{"num_workers: 0": "num_workers: 2"})
    few = subprocess.run(
        command("train", str(recipe), f"run.folder={tmp_path}/few"),
        env=environment(),
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24)),
    )
    assert few.returncode == 1 and "too many open files" in few.stderr.lower(), few.stderr
    assert "Traceback" not in few.stderr
    forbidden = run("train", str(recipe), "run.folder=/proc/nowhere")
    assert forbidden.returncode == 1 and "Traceback" not in forbidden.stderr
    assert "/proc/nowhere" in forbidden.stderr
