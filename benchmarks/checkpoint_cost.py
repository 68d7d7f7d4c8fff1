"""What saving costs the training loop, and where the time goes between a launch and its first step.

    python benchmarks/checkpoint_cost.py --ranks 2                       # two CPU cores: ResNet-18 at 64 px
    python benchmarks/checkpoint_cost.py --sides 224 128                 # a GPU: ResNet-50, batch 256, bf16

The loop is `python -m train` itself, on batches that lie in memory. Its steps are dealt into blocks of three
kinds that take turns: without a save, with one save at the beginning (`ours`), and with the same state
written by `torch.save` and flushed on the training thread, as most scripts do it (`in the loop`; timm's does
not even flush). All work of the device and the writer is waited for between two blocks, and must have ended
before. So the difference of two medians is all that a save costs: the pause, and the steps that the writer
slows down. Where that drowns in the noise of a machine, the CPU time of the writer tells more: busy cores
lose no more than it.

Starts are whole launches with `torchrun` on a prepared data set, killed with SIGKILL after their first
checkpoint: new runs and resumed ones in turns, their parts as the training prints them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import yaml

KINDS = ("without", "ours", "in the loop")
INTERVALS_MINUTES = (10, 5, 1)
NUM_BATCHES_IN_MEMORY = 4
LONGEST_START_SECONDS = 180
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """One training: `warm_steps`, then in each round a block of `block_steps` of each kind."""

    model: str
    side: int
    batch_size: int
    precision: str
    ranks: int
    block_steps: int
    warm_steps: int
    rounds: int
    data: str
    folder: str


@dataclass
class Blocks:
    """What the primary rank of a training measured, in seconds."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    pauses: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    first_pause: float = 0.0
    writer_cpu: list[float] = field(default_factory=list)  # of its thread, for one save
    num_bytes: int = 0
    overran: int = 0  # blocks at whose end the writer was still at work


def main() -> None:
    if sys.argv[1:2] == ["case"]:
        return run_case(Case(**json.loads(Path(sys.argv[2]).read_text())))
    options = _parsed()
    print(f"{_hardware()}; torch {torch.__version__}; {datetime.date.today()}; load {os.getloadavg()[0]:.1f}")
    print(f"`python {shlex.join(['benchmarks/checkpoint_cost.py', *sys.argv[1:]])}`\n", flush=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        data = options.data or _generated_data(Path(scratch))
        if options.rounds:
            for case in _cases(options, str(data), scratch):
                print(_cost_table([_measure(case)]), flush=True)
        if options.starts:
            print(_start_table(_measure_starts(options, str(data), Path(scratch))), flush=True)


def _parsed() -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="resnet50" if has_gpu else "resnet18", help="known to timm")
    add("--sides", nargs="+", type=int, default=[224, 128] if has_gpu else [64], help="pixels")
    add("--batch-size", type=int, default=256 if has_gpu else 64, help="of all ranks")
    add("--precision", default="bf16" if has_gpu else "fp32")
    add("--ranks", type=int, default=1)
    add("--block-steps", type=int, default=40 if has_gpu else 12, help="longer than a save is written")
    add("--rounds", type=int, default=8, help="blocks of each kind; 0: leave them out")
    add("--starts", type=int, default=5, help="new and resumed launches each; 0: leave them out")
    add("--data", help="a prepared data set; without it the embedded one is generated")
    add("--scratch", help="folder for runs and data, on the disk that checkpoints would go to")
    return parser.parse_args()


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else 'a CPU'}"


def _generated_data(folder: Path) -> Path:
    for words in (
        ["generate", "--out", str(folder / "source"), "--num-images", "800"],
        ["prepare", "--source", str(folder / "source"), "--out", str(folder / "data"), "--format", "ffcv"],
    ):
        subprocess.run([sys.executable, "-m", "data_prep", *words], cwd=ROOT, check=True, capture_output=True)
    return folder / "data"


def _cases(options: argparse.Namespace, data: str, scratch: str) -> list[Case]:
    return [
        Case(
            model=options.model,
            side=side,
            batch_size=options.batch_size,
            precision=options.precision,
            ranks=options.ranks,
            block_steps=options.block_steps,
            warm_steps=10,
            rounds=options.rounds,
            data=data,
            folder=f"{scratch}/cost-{side}",
        )
        for side in options.sides
    ]


def recipe_of(case: Case, **checkpoint: Any) -> dict[str, Any]:
    steps = case.warm_steps + len(KINDS) * (case.rounds + 1) * case.block_steps
    return {
        "run": {"folder": f"{case.folder}/runs", "name": "cost", "preflight": False},
        "data": {"path": case.data, "global_batch_size": case.batch_size, "resolution": case.side},
        "model": {"library": "timm", "name": case.model},
        "optimizer": {"name": "sgd", "peak_lr": 0.01, "momentum": 0.9},
        "schedule": {"phases": [{"kind": "constant", "epochs": steps + 1}]},  # an epoch may be one step
        "validation": {"resolution": case.side, "every_epochs": steps + 1},
        "precision": {"mode": case.precision},
        "checkpoint": checkpoint,
        "tracking": {"mlflow": False},
    }


def _launcher(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


# One training of blocks


def _measure(case: Case) -> tuple[Case, Blocks]:
    folder = Path(case.folder)
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps(asdict(case)))
    done = subprocess.run(
        [*_launcher(case.ranks), str(Path(__file__).resolve()), "case", str(folder / "case.json")],
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    result = folder / "result.json"
    if not result.is_file():
        sys.exit(f"the training of {case} ended with code {done.returncode}:\n{done.stdout[-3000:]}")
    return case, Blocks(**json.loads(result.read_text()))


def run_case(case: Case) -> None:
    """On each rank: train, with blocks instead of the recipe's own saves; the process ends inside."""
    import train.loop as loop
    from train.__main__ import main as train_main
    from train.data.loaders.base import Loader

    cast(Any, Loader).epoch = lambda loader, *_, **__: _in_memory(loader, case)
    dealer, step = _Dealer(case), loop.train_step

    def train_step(run: Any, micro_batches: Any) -> None:
        dealer.before_step(run)
        step(run, micro_batches)

    loop.train_step = train_step
    recipe = Path(case.folder) / f"recipe-{os.environ.get('RANK', '0')}.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(case, every_minutes=None)))
    code = train_main([str(recipe)])
    sys.exit(f"the training ended by itself with code {code}")


def _in_memory(loader: Any, case: Case) -> Iterator[Any]:
    from train.data.batch import Batch

    generator = torch.Generator().manual_seed(0)
    count, num_classes = case.batch_size // case.ranks, len(loader.plan.manifest.class_names)
    batches = []
    for _ in range(NUM_BATCHES_IN_MEMORY):
        images = torch.randint(
            0, 256, (count, case.side, case.side, 3), dtype=torch.uint8, generator=generator
        )
        labels = torch.randint(0, num_classes, (count,), generator=generator)
        if torch.cuda.is_available():
            images, labels = images.pin_memory(), labels.pin_memory()
        batches.append(Batch(images, labels, torch.arange(count)))
    return itertools.cycle(batches)


class _Dealer:
    """Begins and ends blocks between two steps, on all ranks at the same ones."""

    def __init__(self, case: Case) -> None:
        self._case, self._blocks = case, Blocks()
        self._kinds = [kind for turn in range(case.rounds + 1) for kind in _turned(turn)]
        self._began = self._writer_cpu = 0.0
        self._kind: str | None = None
        self._num_begun = 0

    def before_step(self, run: Any) -> None:
        position = run.num_done - self._case.warm_steps
        if position < 0 or position % self._case.block_steps:
            return
        if self._kind is not None:
            self._end(run)
        if self._num_begun == len(self._kinds):
            self._finish(run)
        self._begin(run)

    def _begin(self, run: Any) -> None:
        from train.saving import save

        self._kind = self._kinds[self._num_begun]
        self._num_begun += 1
        run.ranks.barrier()
        _synchronize()
        self._writer_cpu = _cpu_seconds_of_the_writer(run)
        self._began = time.perf_counter()
        if self._kind == "ours":
            save(run, is_best=False)
        elif self._kind == "in the loop":
            _save_in_the_loop(run, Path(self._case.folder))
        pause = time.perf_counter() - self._began
        if self._num_begun > len(KINDS):  # the first of each allocates memory, and does not count
            self._blocks.pauses[self._kind].append(pause)
        elif self._kind == "ours":
            self._blocks.first_pause = pause

    def _end(self, run: Any) -> None:
        from train.saving import finish_writing

        assert self._kind is not None
        _synchronize()
        seconds = time.perf_counter() - self._began
        is_late = run.writer is not None and (run.writer._is_busy or bool(run.writer._jobs))
        finish_writing(run, 120)
        if self._num_begun > len(KINDS):
            self._blocks.seconds[self._kind].append(seconds)
            self._blocks.overran += is_late
            if self._kind == "ours":
                self._blocks.writer_cpu.append(_cpu_seconds_of_the_writer(run) - self._writer_cpu)

    def _finish(self, run: Any) -> None:
        if run.ranks.is_primary:
            store = Path(run.folder) / "checkpoints"
            self._blocks.num_bytes = max(path.stat().st_size for path in store.glob("step-*.pt"))
            (Path(self._case.folder) / "result.json").write_text(json.dumps(asdict(self._blocks)))
        run.ranks.barrier()
        sys.stdout.flush()
        os._exit(0)


def _turned(turn: int) -> tuple[str, ...]:
    """The kinds in another order each turn: no one is always the first."""
    return KINDS[turn % len(KINDS) :] + KINDS[: turn % len(KINDS)]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_seconds_of_the_writer(run: Any) -> float:
    if run.writer is None:
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(run.writer._thread.ident))


def _save_in_the_loop(run: Any, folder: Path) -> None:
    """As a script does it: gather, torch.save, flush, rename, all before the next step."""
    from train.saving import _gather_rank_states, _state

    rank_states = _gather_rank_states(run)
    if rank_states is None:
        return
    with (folder / "partial").open("wb") as file:
        torch.save(_state(run, rank_states), file)
        file.flush()
        os.fsync(file.fileno())
    (folder / "partial").replace(folder / "last.pt")


def _cost_table(rows: list[tuple[Case, Blocks]]) -> str:
    shares = " | ".join(f"every {minutes} min" for minutes in INTERVALS_MINUTES)
    lines = [
        f"| | MB | step, ms | pause, ms (min–max; the first) | a save costs, ms | {shares} | every N steps |",
        "|---|---|---|---|---|" + "---|" * (len(INTERVALS_MINUTES) + 1),
    ]
    notes = []
    for case, blocks in rows:
        plain = statistics.median(blocks.seconds["without"])
        lost = {kind: statistics.median(blocks.seconds[kind]) - plain for kind in ("ours", "in the loop")}
        for kind in ("ours", "in the loop"):
            pauses = [1e3 * pause for pause in blocks.pauses[kind]]
            first = f"; {1e3 * blocks.first_pause:.0f}" if kind == "ours" else ""
            of_interval = [f"{lost[kind] / (60 * minutes):.3%}" for minutes in INTERVALS_MINUTES]
            cells = [
                f"{case.model}, {case.side} px, batch {case.batch_size}, {case.precision}, "
                f"{case.ranks} rank(s): {kind}",
                f"{blocks.num_bytes / 1e6:.0f}",
                f"{1e3 * plain / case.block_steps:.1f}",
                f"{statistics.median(pauses):.1f} ({min(pauses):.1f}–{max(pauses):.1f}{first})",
                f"{1e3 * lost[kind]:.0f}",
                *of_interval,
                f"{lost[kind] / plain:.2%} (N = {case.block_steps})",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        spread = max(blocks.seconds["without"]) - min(blocks.seconds["without"])
        notes.append(
            f"{case.side} px: ours ÷ in the loop {lost['ours'] / lost['in the loop']:.2f}; blocks without a "
            f"save differ by up to {1e3 * spread:.0f} ms; {blocks.overran} ended before the writer did; its "
            f"thread used {statistics.median(blocks.writer_cpu):.2f} s of CPU for a save"
        )
    return "\n".join([*lines, "", *notes, ""])


# Starts


def _measure_starts(
    options: argparse.Namespace, data: str, scratch: Path
) -> dict[str, list[tuple[float, dict[str, float]]]]:
    case = Case(
        model=options.model,
        side=options.sides[0],
        batch_size=min(options.batch_size, 64),
        precision=options.precision,
        ranks=options.ranks,
        block_steps=100,
        warm_steps=0,
        rounds=1,
        data=data,
        folder=str(scratch / "starts"),
    )
    Path(case.folder).mkdir()
    recipe = Path(case.folder) / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(case, every_steps=2)))
    found: dict[str, list[tuple[float, dict[str, float]]]] = {"new": [], "resumed": []}
    for number in range(options.starts + 1):
        name = f"run.name=start-{number}"
        for kind, starts in found.items():
            start = _start([*_launcher(case.ranks), "-m", "train", str(recipe), name], kind == "resumed")
            if number:  # the first fills caches, of the disk and of compiled code
                starts.append(start)
    return found


def _start(command: list[str], is_resumed: bool) -> tuple[float, dict[str, float]]:
    """Launch, wait for the first step and for a checkpoint, kill; seconds in all, and by part."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = ""
    try:
        assert process.stdout is not None
        deadline = time.monotonic() + LONGEST_START_SECONDS
        for line in process.stdout:
            said += line
            if (match := re.search(r"first step ([\d.]+) s after the launch: (.*)", line)) is not None:
                break
            if time.monotonic() > deadline:
                sys.exit(f"no first step after {LONGEST_START_SECONDS} s:\n{said}")
        else:
            sys.exit(f"the launch ended without a step:\n{said}")
        if ("going on from" in said) != is_resumed:
            sys.exit(f"the run was {'not ' if is_resumed else ''}resumed:\n{said}")
        time.sleep(0 if is_resumed else 5)  # for the first checkpoint
    finally:
        _kill(process)
    parts = {name: float(seconds) for name, seconds in re.findall(r"([a-z][a-z ]*) ([\d.]+)", match[2])}
    return float(match[1]), parts


def _kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a launcher and all that it has started, its ranks first of all: they are in other groups."""
    family = [process.pid]
    for parent in family:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            family += [int(child) for child in children]
    for member in reversed(family):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    process.wait()


def _start_table(found: dict[str, list[tuple[float, dict[str, float]]]]) -> str:
    names = list(dict.fromkeys(name for starts in found.values() for _, parts in starts for name in parts))
    lines = [
        f"| s, median of {len(found['new'])} | launch to first step (min–max) | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    for kind, starts in found.items():
        totals = [total for total, _ in starts]
        parts = [statistics.median([part.get(name, 0.0) for _, part in starts]) for name in names]
        shown = f"{statistics.median(totals):.1f} ({min(totals):.1f}–{max(totals):.1f})"
        lines.append(f"| {kind} | {shown} | {' | '.join(f'{part:.1f}' for part in parts)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
