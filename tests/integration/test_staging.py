"""Staging from S3: once a machine, together on all ranks; ended by a signal, a fault, a kill, and gone on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.manifest import MANIFEST_NAME
from tests.conftest import ROOT
from tests.integration.launch import environment
from tests.integration.s3_server import SECRET, Asked, Bucket
from tests.integration.s3_sets import NoiseSets, local_files
from train.data.staging import stage, staged_folder
from train.distributed import Ranks

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"), 1)
# A rank as the training has it. It is given a list of calls, and prints what each of them gave; where the
# folder has a place for the rank, every rank is a machine of its own.
RANK = r"""
import json, os, socket, sys
from pathlib import Path

if __name__ == "__main__":  # the process that copies imports this script, too, and has no use for torch
    from train.data.staging import staged_folder
    from train.distributed import Ranks, distributed, exit_rank
    from train.preemption import StopFlag

    def say(line):
        os.write(1, f"{line}\n".encode())  # in one piece: two ranks share the pipe

    class Counting(Ranks):
        rounds = 0
        def sum(self, values):
            Counting.rounds += 1
            return super().sum(values)

    calls = json.loads(sys.argv[1])
    rank = os.environ.get("RANK", "0")
    if "RANK" in calls[0]["stage_folder"]:
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        socket.gethostname = lambda: f"machine-{rank}"
    with distributed() as ranks:
        ranks = Counting(**vars(ranks))
        stop = StopFlag(ranks)
        stop.install()
        say(f"pid of rank {rank}: {os.getpid()}")
        for call in calls:
            os.environ.update(call.get("variables", {}).get(rank, {}))
            folder = Path(call["stage_folder"].replace("RANK", rank))
            Counting.rounds = 0
            try:
                given = staged_folder(call["location"], folder, ranks, lambda: stop.is_raised, say)
            except ValueError as error:
                given = f"error: {error}"
            say(f"rank {rank} after {Counting.rounds} rounds: {given}")
        ranks.barrier()
    exit_rank(0)
"""
STAGE = "import sys; from pathlib import Path; from train.data.staging import stage; "
STAGE += "stage(sys.argv[1], Path(sys.argv[2]), say=lambda line: print(line, flush=True))"


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ranks with a list of calls; what still runs at the end is killed."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with contextlib.ExitStack() as stack:

        def start(num_ranks: int, *calls: dict[str, Any]) -> subprocess.Popen[str]:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
            return stack.enter_context(
                running([*(launcher if num_ranks > 1 else []), script, json.dumps(calls)])
            )

        yield start


@contextlib.contextmanager
def running(words: list[Any]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def given(output: str, num_ranks: int) -> list[list[str]]:
    """What the calls gave on each rank, in order."""
    assert not re.search(rf"Traceback|leaked|{SECRET}", output), output
    return [re.findall(rf"^rank {rank} after \d+ rounds: (.*)$", output, re.M) for rank in range(num_ranks)]


def is_data(asked: Asked) -> bool:
    return asked.operation == "GetObject" and not asked.key.endswith(MANIFEST_NAME)


def fetched(bucket: Bucket) -> Counter[tuple[str, str]]:
    """(file, range) → how often its bytes came; the manifest, which every start reads, apart."""
    return Counter((asked.key, asked.range) for asked in bucket.server.asked if is_data(asked) and asked.down)


def put_new_version(bucket: Bucket, key: str) -> None:
    """Another manifest, the same files."""
    bucket.put(key, bucket.get(key).replace(b'"tool_version": "', b'"tool_version": "1'))


def test_ranks_of_a_machine_stage_once_and_then_reuse(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, launch: Any
) -> None:
    bucket.put_folder("some/imagenet", noise_sets.folder("ffcv"))
    # S3 gives nothing for a while: the ranks must meet meanwhile, lest their reductions time out.
    bucket.server.clear(lambda asked: "stall:2" if is_data(asked) and not any_data_before(asked) else None)

    def any_data_before(asked: Asked) -> bool:
        return any(is_data(before) for before in bucket.server.asked if before is not asked)

    call = {"location": bucket.at("some/imagenet"), "stage_folder": str(tmp_path / "stage")}
    process = launch(2, call, call | {"location": call["location"] + "/"})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    folders = {folder for of_rank in given(output, 2) for folder in of_rank}
    assert len(folders) == 1 and all(len(of_rank) == 2 for of_rank in given(output, 2)), output
    folder = Path(folders.pop())
    assert folder.parent == tmp_path / "stage" and folder.name.startswith("imagenet-")
    assert local_files(folder) == noise_sets.files("ffcv")
    rounds = re.findall(r"^rank \d after (\d+) rounds", output, re.M)
    assert max(map(int, rounds)) >= 2, "the ranks met while S3 gave nothing"
    assert set(fetched(bucket).values()) == {1}
    assert output.count("staged: ") == output.count("is reused") == 1


@pytest.mark.long
def test_a_signal_to_one_rank_ends_staging_on_all(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, launch: Any
) -> None:
    bucket.put_folder("set", noise_sets.folder("ffcv"))
    bucket.server.clear(lambda asked: "stall:60" if is_data(asked) else None)
    process = launch(2, {"location": bucket.at("set"), "stage_folder": str(tmp_path / "stage")})
    pids = {}
    for line in process.stdout:
        if found := re.match(r"pid of rank (\d): (\d+)", line):
            pids[int(found[1])] = int(found[2])
        if len(pids) == 2:
            break
    wait_until(lambda: any(map(is_data, bucket.server.asked)), process)
    os.kill(pids[1], signal.SIGTERM)  # the rank that only waits
    output, _ = process.communicate(timeout=50)  # S3 would still be silent
    assert process.returncode == 0 and given(output, 2) == [["None"], ["None"]], output
    assert "staging was stopped by a signal: the next start goes on from here" in output
    assert not list((tmp_path / "stage").rglob(MANIFEST_NAME))
    bucket.server.clear()
    said: list[str] = []
    copy = stage(bucket.at("set"), tmp_path / "stage", False, said.append)
    assert local_files(copy.folder) == noise_sets.files("ffcv")
    assert not any("waiting" in line for line in said), "nobody holds the folder any more"


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.long
def test_machines_share_a_version_and_a_fault(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, launch: Any
) -> None:
    bucket.put_folder("set", noise_sets.folder("ffcv"))
    bucket.put_folder("changed", noise_sets.folder("ffcv"))
    stage(bucket.at("changed"), tmp_path / "machine-0", progress=False)
    stage(bucket.at("changed"), tmp_path / "machine-1", progress=False)
    put_new_version(bucket, f"changed/{MANIFEST_NAME}")
    (tmp_path / "file-1").write_text("no folder")
    machine = str(tmp_path / "machine-RANK")
    unreachable = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "S3_MAX_ATTEMPTS": "1"}
    process = launch(
        2,
        {"location": bucket.at("set"), "stage_folder": machine},
        {"location": bucket.at("set"), "stage_folder": str(tmp_path / "file-RANK")},
        {"location": bucket.at("changed"), "stage_folder": machine, "variables": {"1": unreachable}},
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    results = given(output, 2)
    for rank, (folder, *faults) in enumerate(results):
        assert Path(folder).parent == tmp_path / f"machine-{rank}"
        assert local_files(Path(folder)) == noise_sets.files("ffcv")
        assert faults == results[0][1:]
    no_folder, two_versions = results[0][1:]
    assert no_folder.startswith(f"error: {tmp_path / 'file-1'} is no folder that may be written to")
    assert no_folder.endswith("(on machine-1)")
    assert f"error: the machines hold different versions of {bucket.at('changed')}" in two_versions
    assert "warning: the copy that an earlier run staged in" in output


def test_killed_and_started_again(bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, launch: Any) -> None:
    bucket.put_folder("set", noise_sets.folder("dali"))
    call = {"location": bucket.at("set"), "stage_folder": str(tmp_path / "stage")}
    faults = ["stall:2", "kill"]  # after the kill there is time to end, and then S3 would answer again
    bucket.server.clear(
        lambda asked: faults.pop() if faults and asked.key.endswith("train-00002.tar") else None
    )
    process = launch(1, call)
    bucket.server.victim = process.pid
    output, _ = process.communicate(timeout=60)  # its pipe ends with the process that copies
    assert process.returncode == -signal.SIGKILL, output
    assert not list((tmp_path / "stage").rglob(MANIFEST_NAME))
    came = {name for name, _ in fetched(bucket) if name.endswith(".tar")}
    assert {"set/train-00000.tar", "set/train-00001.tar"} <= came
    bucket.server.clear()
    again = launch(1, call)
    output, _ = again.communicate(timeout=60)
    (folder,) = given(output, 1)[0]
    assert local_files(Path(folder)) == noise_sets.files("dali"), output
    assert not {name for name, _ in fetched(bucket)} & {"set/train-00000.tar", "set/train-00001.tar"}
    assert "0.0 MB were there already" not in output


def test_two_jobs_at_once_copy_once(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, launch: Any
) -> None:
    bucket.put_folder("set", noise_sets.folder("ffcv"))
    bucket.server.clear(lambda asked: "503 SlowDown" if is_data(asked) else None)
    words = ["-c", f"import os; os.environ['S3_MAX_ATTEMPTS'] = '100000'; {STAGE}"]
    words += [bucket.at("set"), str(tmp_path / "stage")]
    with running(words) as first:
        wait_until(lambda: any(map(is_data, bucket.server.asked)), first)
        with running(words) as second:
            assert second.stdout is not None
            assert "another process is staging" in second.stdout.readline()
            bucket.server.clear()
            outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
            assert first.returncode == second.returncode == 0, outputs
    assert "all checksums agree" in outputs[0] and "is reused" in outputs[1]
    assert "waiting" not in outputs[1] and set(fetched(bucket).values()) == {1}
    (folder,) = (tmp_path / "stage").iterdir()
    assert local_files(folder) == noise_sets.files("ffcv")


def test_one_process_without_a_group(
    bucket: Bucket, noise_sets: NoiseSets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_folder("set", noise_sets.folder("ffcv"))
    said: list[str] = []
    target = tmp_path / "stage"
    with pytest.raises(ValueError, match=r"empty holds no manifest\.json"):
        staged_folder(bucket.at("empty"), target, ALONE, say=said.append)
    assert said == [] and not target.exists()
    folder = staged_folder(bucket.at("set"), target, ALONE, say=said.append)
    assert folder is not None and local_files(folder) == noise_sets.files("ffcv")
    assert staged_folder(bucket.at("set"), target, ALONE, lambda: True, said.append) is None
    bucket.server.rule = lambda asked: "403 AccessDenied"
    assert staged_folder(bucket.at("set"), target, ALONE, say=said.append) == folder
    assert "access denied" in said[-1] and said[-1].startswith("warning: ")
    with pytest.raises(ValueError, match="access denied"):
        staged_folder(bucket.at("other"), target, ALONE, say=said.append)
    assert not any(SECRET in line for line in said)
    assert multiprocessing.active_children() == []
