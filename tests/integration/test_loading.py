"""Loaders in processes of their own: what they leave behind, signals, stuck disks, kills, world sizes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from tests.conftest import ROOT
from tests.integration import launch
from tests.integration.launch import environment
from tests.integration.record_ids import GLOBAL_BATCH_SIZE, NUM_EPOCHS
from tests.unit.train.loader_cases import CASES, NUM_TRAIN, SEED, Case, long_but
from train.data.order import epoch_order

SECONDS = 120  # until a process counts as one that hangs


def start(what: str, case: Case, folder: Path) -> subprocess.Popen[str]:
    words = [what, case.backend, str(case.num_workers), str(folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.use_loader", *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait(process: subprocess.Popen[str], workers: list[int] | None = None) -> tuple[str, str]:
    """What it printed; its workers must have ended with it. Whatever did not is killed."""
    try:
        output = process.communicate(timeout=SECONDS)
        assert [pid for pid in workers or [] if is_alive(pid)] == []
        return output
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("case", long_but("ffcv", "dali"))
@pytest.mark.long
def test_nothing_is_left_behind(prepared: tuple[Path, Manifest], case: Case) -> None:
    process = start("endings", case, prepared[0])
    out, err = wait(process)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert len(found) == 11 and {name: left for name, left in found.items() if left} == {}


@pytest.mark.parametrize("case", long_but("reference-workers"))
@pytest.mark.long
def test_ctrl_c_ends_the_process_and_its_workers(prepared: tuple[Path, Manifest], case: Case) -> None:
    process = start("forever", case, prepared[0])
    assert process.stdout is not None
    workers = json.loads(process.stdout.readline())
    assert len(workers) == case.num_workers
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes
    _, err = wait(process, workers)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in err


@pytest.mark.parametrize("case", long_but("reference-workers"))
@pytest.mark.long
def test_signals_to_a_whole_job_are_for_the_rank_alone(prepared: tuple[Path, Manifest], case: Case) -> None:
    process = start("signals", case, prepared[0])
    out, err = wait(process)
    assert process.returncode == 0 and "died unexpectedly" not in err, err
    came, num_samples = json.loads(out)
    assert came == ["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1"]
    assert num_samples == 2 * NUM_TRAIN


@pytest.mark.long
def test_a_process_ends_though_nobody_closed_its_workers(prepared: tuple[Path, Manifest]) -> None:
    process = start("whole", Case("reference", num_workers=2), prepared[0])
    assert process.stdout is not None
    _, err = wait(process, json.loads(process.stdout.readline()))
    assert process.returncode == 0, err


@pytest.mark.parametrize("case", long_but("reference"))
@pytest.mark.long
def test_a_process_whose_disk_is_stuck_says_so_and_ends(prepared: tuple[Path, Manifest], case: Case) -> None:
    process = start("stuck", case, prepared[0])
    _, err = wait(process)
    assert process.returncode == 1
    where = f"the loader is {'' if case.num_workers else 'reading '}"
    assert f"sample 17 in {prepared[0] / 'train.beton'}" in err and where in err
    assert "rank 0: no batch for" in err  # warned before it gave up
    assert "RuntimeError: no batch came for" in err and "raise data.timeout_seconds" in err


NUM_STEPS = NUM_TRAIN // GLOBAL_BATCH_SIZE  # of an epoch
KILLS = [
    pytest.param(Case("reference"), [3, 2], id="reference"),
    pytest.param(Case("ffcv"), [2, 1], marks=pytest.mark.ffcv, id="ffcv"),
    pytest.param(Case("dali"), [1, 2], marks=pytest.mark.dali, id="dali"),
]


@pytest.mark.parametrize(("case", "world_sizes"), KILLS)
def test_killed_and_taken_up_on_other_ranks(
    prepared: tuple[Path, Manifest], tmp_path: Path, case: Case, world_sizes: list[int]
) -> None:
    run_with_kills(prepared[0], tmp_path, case, world_sizes, random.Random(0))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again(
    prepared: tuple[Path, Manifest], tmp_path: Path, case: Case, seed: int
) -> None:
    moments = random.Random(seed)
    world_sizes = [moments.randint(1, 3) for _ in range(6)]
    run_with_kills(prepared[0], tmp_path, case, world_sizes, moments)


def run_with_kills(
    folder: Path, out: Path, case: Case, world_sizes: list[int], moments: random.Random
) -> None:
    """Start on each of the world sizes in turn, kill all but the last, and look at what counts."""
    begins = []
    for attempt, world_size in enumerate(world_sizes):
        begins.append(checkpoint(out))
        words = [case.backend, str(case.num_workers), str(folder), str(out), str(attempt)]
        process = launch.start("tests.integration.record_ids", *words, num_ranks=world_size)
        try:
            if attempt == len(world_sizes) - 1:
                text, _ = process.communicate(timeout=SECONDS)
                assert process.returncode == 0, text
            else:
                num_lines = world_size * moments.randint(1, NUM_STEPS * NUM_EPOCHS // len(world_sizes))
                await_lines(process, out, attempt, num_lines)
                time.sleep(moments.uniform(0, 0.1))
        finally:
            kill_tree(process)
    ends = [*begins[1:], NUM_EPOCHS * NUM_STEPS]
    counted = []
    for attempt, (world_size, begin, end) in enumerate(zip(world_sizes, begins, ends, strict=True)):
        steps = recorded(out, attempt, world_size)
        counted += [
            (step, [sample_id for ids in steps[step] for sample_id in ids]) for step in range(begin, end)
        ]
        assert min(steps) >= begin
    orders = [epoch_order(SEED, epoch, NUM_TRAIN).tolist() for epoch in range(NUM_EPOCHS)]
    slices = [slice(step * GLOBAL_BATCH_SIZE, (step + 1) * GLOBAL_BATCH_SIZE) for step in range(NUM_STEPS)]
    expected = [order[part] for order in orders for part in slices]
    assert counted == list(enumerate(expected))


def checkpoint(out: Path) -> int:
    """Steps that were completed, over all epochs, as the rank that saved it saw it."""
    path = out / "checkpoint.json"
    return json.loads(path.read_text()) if path.exists() else 0


def recorded(out: Path, attempt: int, world_size: int) -> dict[int, list[list[int]]]:
    """Step → the ids of each rank; only steps that all ranks have seen, each once."""
    steps: dict[int, list[list[int]]] = defaultdict(list)
    for rank in range(world_size):
        for line in (out / f"{attempt}-{rank}.jsonl").read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else it was killed while writing
                entry = json.loads(line)
                steps[entry["step"]].append(entry["ids"])
    return {step: shares for step, shares in steps.items() if len(shares) == world_size}


def await_lines(process: subprocess.Popen[str], out: Path, attempt: int, num_lines: int) -> None:
    deadline = time.monotonic() + SECONDS
    while sum(path.read_text().count("\n") for path in out.glob(f"{attempt}-*.jsonl")) < num_lines:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it records nothing"
        time.sleep(0.01)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """As a lost machine: the launcher, its ranks, their workers."""
    # One that has ended has no number any more; another process may have it.
    for pid in list(descendants(process.pid)) if process.poll() is None else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def descendants(pid: int) -> Iterator[int]:
    """A process, still stopped from starting others, and all below it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return
    for child in children:
        yield from descendants(int(child))
