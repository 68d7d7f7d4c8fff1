"""Start `python -m data_prep` so that it kills itself at a chosen storage operation; alone, or in a nursery.

Each write, deletion, piece and finish of a local folder counts as one operation with three points: before it,
in the middle (half of its bytes are written; not yet renamed), and after it. Point p is that of operation
p // 3. At the point the process kills itself with SIGKILL, as a lost machine would.

    python -m tests.integration.die_at 17 prepare --source … --out …

A nursery is a process that has imported everything and normalised a source's images once. It forks a child
for each start that it is asked for (a line of JSON each), with threads instead of worker processes: a start
then takes tens of milliseconds, and hundreds of kills can be tried.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import __main__, normalize, ranks, storage, workers
from data_prep.manifest import ImageSettings

ROOT = Path(__file__).parent.parent.parent  # not from conftest, which imports torch
Normalized = dict[tuple[bytes, str, bool], Any]


class DeathClock:
    """Counts operations, and dies at a point of one."""

    def __init__(self, point: int | None, counts: int, pause: float) -> None:
        self._point, self._counts, self._pause = point, counts, pause
        self._lock = threading.Lock()
        self._operation = -1

    def begin(self, kind: str) -> int:
        time.sleep(self._pause)
        with self._lock:
            self._operation += 1
            os.pwrite(self._counts, kind.encode(), 8 + self._operation)
            self.at(3 * self._operation)
            return 3 * self._operation

    def at(self, point: int) -> None:
        if point == self._point:
            os.kill(os.getpid(), signal.SIGKILL)

    def half(self, operation: int) -> bool:
        return operation + 1 == self._point


def arm(point: int | None, counts: int, pause: float = 0.0) -> None:
    """Patch the storage of this process; file `counts` holds images normalised and operations."""
    clock = DeathClock(point, counts, pause)
    pieces = storage._LocalPieces
    write, delete, put, finish = (
        storage.write_atomically,
        storage.LocalFolder.delete,
        pieces.put,
        pieces.finish,
    )

    def dying_write(path: Path, content: bytes) -> None:
        operation = clock.begin("w")
        if clock.half(operation):
            path.with_name(f".{path.name}.partial").write_bytes(content[: len(content) // 2])
            clock.at(operation + 1)
        write(path, content)
        clock.at(operation + 2)

    def dying_delete(self: storage.LocalFolder, name: str) -> None:
        operation = clock.begin("d")
        clock.at(operation + 1)
        delete(self, name)
        clock.at(operation + 2)

    def dying_put(self: Any, number: int, content: bytes) -> None:
        operation = clock.begin("p")
        if clock.half(operation):
            os.pwrite(self._file, content[: len(content) // 2], number * self._piece_bytes)
            clock.at(operation + 1)
        put(self, number, content)
        clock.at(operation + 2)

    def dying_finish(self: Any, num_pieces: int, num_bytes: int) -> None:
        operation = clock.begin("f")
        if clock.half(operation):
            os.ftruncate(self._file, num_bytes)
            clock.at(operation + 1)
        finish(self, num_pieces, num_bytes)
        clock.at(operation + 2)

    storage.write_atomically = dying_write
    storage.LocalFolder.delete = dying_delete  # type: ignore[method-assign]
    pieces.put, pieces.finish = dying_put, dying_finish  # type: ignore[method-assign]


@dataclass
class Ended:
    """How a start ended: exit status (negative: by a signal), storage operations, images normalised, text.

    An operation is a letter: write a small file, delete, put a piece, finish a file.
    """

    status: int
    operations: str
    num_normalized: int
    text: str


@dataclass
class Start:
    """Words after `python -m data_prep`; a point to die at, or a signal some time after its first line."""

    words: list[str]
    point: int | None = None
    signal: int | None = None
    after: float = 0.0  # seconds
    pause: float = 0.0  # before each storage operation: a slow machine
    env: dict[str, str] = field(default_factory=dict)


class Nursery:
    """The nursery from the outside; a context manager. It knows the images in `source` by heart."""

    def __init__(self, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.die_at", "--nursery", str(source)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *words: str, **how: Any) -> Ended:
        return self.start_together(Start(list(words), **how))[0]

    def start_together(self, *starts: Start, seconds: float = 60) -> list[Ended]:
        """Start some at the same time and wait for them; STILL RUNNING after `seconds` is in their text."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"starts": [vars(start) for start in starts], "seconds": seconds}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [Ended(**answer) for answer in json.loads(self._process.stdout.readline())]

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


def serve(source: Path) -> None:
    """The nursery from the inside."""
    known: Normalized = {}
    settings = ImageSettings()
    for path in sorted(source.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            for statistics in (False, True):
                try:
                    image = normalize.normalize(content, settings, statistics)
                except normalize.Rejected:
                    continue
                known[content, settings.model_dump_json(), statistics] = image
    for line in sys.stdin:
        request = json.loads(line)
        starts = [Start(**start) for start in request["starts"]]
        children = [_fork(start, known) for start in starts]
        print(json.dumps([vars(end) for end in _attend(starts, children, request["seconds"])]), flush=True)


def _fork(start: Start, known: Normalized) -> tuple[int, int, int]:
    """(process id, file of its output, file of its counts) of a child that runs it."""
    output, counts = (os.memfd_create(name) for name in ("output", "counts"))
    child = os.fork()
    if child:
        return child, output, counts
    status = 99
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(start.env)
        ranks.MEET_SECONDS = float(os.environ.get("PREPARE_MEET_SECONDS", "20"))
        ranks.QUIET_SECONDS = float(os.environ.get("PREPARE_QUIET_SECONDS", "20"))
        num_normalized = 0

        def remembered(content: bytes, settings: ImageSettings, statistics: bool) -> Any:
            nonlocal num_normalized
            num_normalized += 1
            os.pwrite(counts, f"{num_normalized:08d}".encode(), 0)
            key = (content, settings.model_dump_json(), statistics)
            return known[key] if key in known else normalize.normalize(content, settings, statistics)

        workers.normalize = remembered  # type: ignore[attr-defined]
        workers.build_pool = ThreadPoolExecutor
        arm(start.point, counts, start.pause)
        status = __main__.main(start.words)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _attend(starts: list[Start], children: list[tuple[int, int, int]], seconds: float) -> list[Ended]:
    """Wait for all children; send what signals were asked for, and end what still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    spoke: dict[int, float] = {}
    ended: dict[int, Ended] = {}
    while len(ended) < len(children):
        for place, (start, (child, output, counts)) in enumerate(zip(starts, children, strict=True)):
            if place in ended:
                continue
            now = time.monotonic()
            if os.fstat(output).st_size:
                spoke.setdefault(place, now)
            if start.signal and place in spoke and now - spoke[place] >= start.after:
                os.kill(child, start.signal)
                start.signal = None
            if now > deadline:
                os.kill(child, signal.SIGKILL)
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                text = os.pread(output, 1 << 20, 0).decode(errors="replace")
                if now > deadline:
                    text += "STILL RUNNING"
                numbers = os.pread(counts, 1 << 20, 0).decode().ljust(8, "\0")
                os.close(output)
                os.close(counts)
                normalized, operations = int(numbers[:8].strip("\0") or 0), numbers[8:]
                ended[place] = Ended(os.waitstatus_to_exitcode(status), operations, normalized, text)
        time.sleep(0.002)
    return [ended[place] for place in range(len(children))]


if __name__ == "__main__":
    if sys.argv[1] == "--nursery":
        serve(Path(sys.argv[2]))
    else:
        arm(int(sys.argv[1]), os.memfd_create("counts"))
        sys.exit(__main__.main(sys.argv[2:]))
