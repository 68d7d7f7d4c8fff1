"""A process that has imported what the project's commands import, and forks one for each that is asked for.

Most of a short command's time goes into importing torch, timm and the rest, and each rank of torchrun does
so again. Here a command, and each of its ranks, is a fork of a process that has done it. It is a process of
its own all the same, with its own arguments, variables, signals and files, and runs its module from the
first line on:

    tests: run("train", …) → nursery → keeper → `train`
                                     → keeper → torchrun → `train`, rank 0
                                                         → `train`, rank 1

A keeper waits for its command, and tells how it ended. Started anew, as a user does, are all commands of
`make test-long` (COMMANDS_ANEW=1), and of `make test` those of test_never_lost, test_heartbeat and the storm,
and README's, the demo's and the notebook's.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent.parent
# FFCV and DALI are not among them: they start threads when they are imported, and threads are not forked.
IMPORTED_FIRST = (
    *("torch", "torch._dynamo", "torch.distributed.launcher.api", "torchvision.transforms.v2", "timm"),
    *("mlflow", "mlflow.store.tracking.sqlalchemy_store"),
    *("train.loop", "train.check", "train.run_folder", "train.data.loaders.reference"),
    "evaluation.report.command",
)
# What Python and libraries read when they start: where one of these is another, a command is started anew.
READ_AT_START = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "CUDA_", "MPL", "NUMBA_", "TORCH", "HF_")
MOST_BYTES = 1 << 18  # of a request: the words and variables of a command
MOST_FILES = 1 << 16


class Nursery:
    """The tests' end of it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.command_nursery", str(theirs.fileno())],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self.close)

    def can_run(self, environment: dict[str, str]) -> bool:
        def of_start(variables: dict[str, str]) -> dict[str, str]:
            return {name: value for name, value in variables.items() if name.startswith(READ_AT_START)}

        return of_start(environment) == of_start(self.environment)

    def close(self) -> None:
        self.socket.close()
        self._process.wait()


class NurseryCommand(subprocess.Popen):  # type: ignore[type-arg]
    """As `subprocess.Popen([sys.executable, "-m", …], cwd=ROOT)`, but forked by the nursery."""

    def __init__(self, nursery: Nursery, words: list[str], environment: dict[str, str], **pipes: Any) -> None:
        self._nursery, self._words, self._environment = nursery, words, environment
        super().__init__(words, text=True, **pipes)

    def _execute_child(self, *arguments: Any) -> None:  # of Popen, which would fork and exec
        outputs = [arguments[13], arguments[15]]  # c2pwrite and errwrite
        ended, told = os.pipe()
        self._ended = os.fdopen(ended, "rb", buffering=0)
        job = {"words": self._words[2:], "variables": self._environment}
        try:
            socket.send_fds(self._nursery.socket, [json.dumps(job).encode()], [*outputs, told])
        finally:
            for file in {*outputs, told}:
                os.close(file)
        self._child_created = True
        self.pid = int(self._answer())

    def _answer(self) -> str:
        """A number of eight digits; nothing where the keeper was killed."""
        return self._ended.read(8).decode()

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            with self._waitpid_lock:  # type: ignore[attr-defined]  # another thread may wait, too
                if self.returncode is None:
                    self.returncode = os.waitstatus_to_exitcode(int(self._answer() or signal.SIGKILL))
        return self.returncode


class ForkedRank(subprocess.Popen):  # type: ignore[type-arg]
    """What torchrun takes for the process of a rank."""

    def __init__(self, words: tuple[str, ...], environment: dict[str, str]) -> None:
        self._words, self._environment = words, environment
        super().__init__([sys.executable, "-u", "-m", *words])

    def _execute_child(self, *arguments: Any) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            os.closerange(3, MOST_FILES)
            os.setsid()  # as torchrun asks for
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
            _become(list(self._words), self._environment)
        self._child_created = True


def _adapt_torchrun() -> None:
    """Let torchrun fork its ranks, if they run a module and write where it does."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    plain = subprocess_handler.SubprocessHandler._popen

    def popen(self: Any, words: tuple[str, ...], environment: dict[str, str]) -> Any:
        if words[:3] != (sys.executable, "-u", "-m") or self._stdout or self._stderr:
            return plain(self, words, environment)
        return ForkedRank(words[3:], environment)

    subprocess_handler.SubprocessHandler._popen = popen  # type: ignore[assignment,method-assign]
    # It looks through all modules for the name of the calling function; here, there are thousands.
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name


def _become(words: list[str], environment: dict[str, str]) -> NoReturn:
    """Run a module in this fork as `python -m` runs it, and leave as that does."""
    for number in signal.valid_signals():
        if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    is_interrupted, code = False, 0
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        if leave.code is not None and not isinstance(leave.code, int):
            print(leave.code, file=sys.stderr)
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException as error:
        traceback.print_exc()
        is_interrupted, code = isinstance(error, KeyboardInterrupt), 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python's own end does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _keep(job: dict[str, Any], outputs: list[int], told: int) -> NoReturn:
    """Fork a command and say its number; say how it ended."""
    child = os.fork()
    if child == 0:
        for number, file in enumerate(outputs, 1):
            os.dup2(file, number)
        os.closerange(3, MOST_FILES)
        _become(job["words"], job["variables"])
    for file in outputs:
        os.close(file)
    os.write(told, b"%08d" % child)
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(BrokenPipeError):  # nobody asks any more
        os.write(told, b"%08d" % status)
    os._exit(0)


def main() -> NoReturn:
    jobs = socket.socket(fileno=int(sys.argv[1]))
    for name in IMPORTED_FIRST:
        importlib.import_module(name)
    _adapt_torchrun()
    gc.freeze()  # a collection in a fork would touch, and so copy, all pages
    while True:
        message, files, _, _ = socket.recv_fds(jobs, MOST_BYTES, 3)
        if not message:
            os._exit(0)  # the tests are over; without a teardown of all these libraries
        if os.fork() == 0:
            jobs.close()
            _keep(json.loads(message), files[:2], files[2])
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # keepers whose commands have ended


if __name__ == "__main__":
    main()
