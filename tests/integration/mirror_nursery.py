"""A process that has imported the mirror, and forks a child for each save or restore that it is asked for.

A child starts in tens of milliseconds then, so that it can be killed at every one of its requests. Each line
of JSON on the standard input is a job; its child waits until the tests know its number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_prep import s3_requests
from train.checkpoint import CheckpointStore, transfer
from train.checkpoint.mirror import CheckpointMirror

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20


class Nursery:
    """The tests' end of it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.mirror_nursery"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def run(self, server: Any, job: str, folder: Path, location: str) -> int:
        """Do it in a child, which is the victim of `server`; its exit code, or minus the signal's number."""
        names = [name for name in os.environ if name.startswith("AWS_")]
        variables = {name: os.environ[name] for name in names}
        self._ask({"job": job, "folder": str(folder), "location": location, "variables": variables})
        server.victim = int(self._answer())
        self._ask("go")
        code = os.waitstatus_to_exitcode(int(self._answer()))
        server.victim = None
        return code

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if any(os.environ.get(name) != value for name, value in job["variables"].items()):
            os.environ.update(job["variables"])
            s3_requests._client.cache_clear()
            s3_requests.client()  # made once, it has no connection yet
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(_do(job))
        os.close(read)
        print(child, flush=True)
        sys.stdin.readline()
        os.close(write)
        print(os.waitpid(child, 0)[1], flush=True)


def _do(job: dict[str, Any]) -> int:
    transfer.PIECE_BYTES = 5 * MIB
    folder = Path(job["folder"])
    mirror = CheckpointMirror(job["location"], say=lambda sentence: None)
    if job["job"] == "restore":
        return 0 if mirror.restore(folder) is not None else 2
    mirror.claim()
    mirror.submit(folder, CheckpointStore(folder / "checkpoints").manifest())
    code = 0 if mirror.wait(timeout_seconds=30) else 3
    mirror.close(timeout_seconds=30)
    return code


if __name__ == "__main__":
    main()
