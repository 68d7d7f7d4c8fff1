"""Many small trainings side by side on one GPU: the recipes of docs/systems/, to their end, in minutes.

    python benchmarks/gpu_systems.py benchmarks/gpu_systems.yaml --data DATA --out OUT --seconds 600

Alone, a small training leaves a GPU idle: decoding and the launch of its kernels are the limit. So several
run at once, each in processes of its own, in the order of the plan; one starts as soon as a place is free,
its data set lies in DATA and the run it begins with has finished. At the end of its minutes, or of all, a
training is asked to stop, as on Ctrl-C. What has ended is in OUT at once: `table.md`, `runs.json`,
`runs.tar.gz` (recipes, metrics, summaries; no checkpoints), `logs/`. Images/s are those of a shared machine,
and no network's speed.

A plan is YAML. `trainings`: `name`, `recipe` (of configs/), `data` (a folder in DATA), and if wanted `seeds`,
`changes` (a recipe's overrides), `checkpoint` (the training whose weights it begins with), `workers` and
`minutes`. `commands`: `name`, `words` (after `python -m`; {runs}, {data} and {out} are filled in), `after`
(trainings that must have finished), `alone` (start when nothing else runs); they run after the end, too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_STOP = 15.0
RETURNED = ("recipe.yaml", "metrics.jsonl", "summary.json", "status.json")
COLUMNS = (
    "run | recipe | seed | weights | final top-1 | best top-1 (epoch) | final top-5 | train top-1 | epochs | "
    "minutes | images/s, shared | peak memory, GB | how it ended"
)


@dataclass
class Job:
    """A training or a command: what it waits for, its process, and how it ended."""

    name: str
    words: list[str]  # of Python
    minutes: float
    after: list[str] = field(default_factory=list)
    data: Path | None = None
    alone: bool = False
    recipe: str = ""  # of a training
    seed: int = 0
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    ended: float = 0.0
    fate: str = ""  # "" until it ended; then "finished", "stopped", "failed (…)", "never started (…)"
    stop_asked: float = 0.0

    @property
    def is_running(self) -> bool:
        return self.process is not None and not self.fate


class Queue:
    """Starts jobs in order, as many at once as there are places, and writes down how they ended."""

    def __init__(self, jobs: list[Job], options: argparse.Namespace) -> None:
        self.jobs = jobs
        self._by_name = {job.name: job for job in jobs}
        self._options = options
        self._runs = options.runs
        self._began = time.monotonic()
        self._end = self._began + options.seconds
        (options.out / "logs").mkdir(parents=True, exist_ok=True)

    def work(self) -> int:
        """Until all jobs have ended; the number of those that failed."""
        while not all(job.fate for job in self.jobs):
            for job in self.jobs:
                if job.is_running:
                    self._look_after(job)
                elif not job.fate:
                    self._start_if_possible(job)
            if self._num_failed() > self._options.max_failures:
                self._end = min(self._end, time.monotonic())
            time.sleep(0.2)
        self.write()
        return self._num_failed()

    def _num_failed(self) -> int:
        return sum(job.fate.startswith("failed") for job in self.jobs)

    def _start_if_possible(self, job: Job) -> None:
        if job.recipe and time.monotonic() >= self._end:
            job.fate = "never started (no time)"
            return
        others = [self._by_name[name] for name in job.after]
        if missing := [other.name for other in others if other.fate not in ("", "finished")]:
            job.fate = f"never started ({missing[0]} did not finish)"
            return
        running = sum(other.is_running for other in self.jobs)
        is_ready = all(other.fate for other in others) and (
            job.data is None or (job.data / "manifest.json").is_file()
        )
        if not is_ready or running >= (1 if job.alone else self._options.parallel):
            return
        if any(other.alone and other.is_running for other in self.jobs):
            return
        job.began = time.monotonic()
        with (self._options.out / "logs" / f"{job.name}.log").open("wb") as log:
            job.process = subprocess.Popen(
                [sys.executable, *job.words], cwd=ROOT, env=_environment(), stdout=log, stderr=log
            )
        self._say(f"{job.name} begins")

    def _look_after(self, job: Job) -> None:
        assert job.process is not None
        now, limit = time.monotonic(), job.began + 60 * job.minutes
        code = job.process.poll()
        if code is not None:
            job.ended = now
            if self._summary(job) is not None or (not job.recipe and code == 0):
                job.fate = "finished"
            else:
                job.fate = "stopped" if job.stop_asked else f"failed (exit code {code})"
            self._say(f"{job.name} {job.fate} after {now - job.began:.0f} s")
            self.write()
        elif job.stop_asked and now > job.stop_asked + SECONDS_TO_STOP:
            job.process.kill()
        elif not job.stop_asked and now > (min(limit, self._end) if job.recipe else limit):
            job.stop_asked = now
            job.process.send_signal(signal.SIGTERM)

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {line}", flush=True)

    def _summary(self, job: Job) -> dict[str, Any] | None:
        path = self._runs / job.name / "summary.json"
        return json.loads(path.read_text()) if job.recipe and path.is_file() else None

    def _figures(self, job: Job) -> dict[str, Any]:
        """Of a training: its summary, or where it has none its rows; and train top-1 of the last epoch."""
        path = self._runs / job.name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        judged = [row for row in rows if row["split"] == "val"]
        trained = [row for row in rows if row["split"] == "train"]
        figures: dict[str, Any] = self._summary(job) or {}
        if judged and not figures:
            last, best = judged[-1], max(judged, key=lambda row: row["top1"])
            figures = {
                "final_top1": last["top1"],
                "final_top5": last["top5"],
                "best_top1": best["top1"],
                "best_epoch": best["epoch"],
                "epochs": last["epoch"],
            }
        if trained:
            newest = [row["top1"] for row in trained if row["epoch"] > trained[-1]["epoch"] - 1]
            figures["train_top1"] = sum(newest) / len(newest)
        return figures

    def write(self) -> None:
        """Table, figures and the small files of all runs, as they are now."""
        trainings = [job for job in self.jobs if job.recipe and job.fate]
        figures = {job.name: self._figures(job) for job in trainings}
        lines = [f"| {COLUMNS} |", "|" + "---|" * (COLUMNS.count("|") + 1)]
        lines += [_row(job, figures[job.name]) for job in trainings]
        header = (
            f"{datetime.date.today()}, {_hardware()}, torch {torch.__version__}; {len(trainings)} trainings"
        )
        out: Path = self._options.out
        (out / "table.md").write_text("\n".join([header, "", *lines]) + "\n")
        said = {
            job.name: figures[job.name] | {"fate": job.fate, "seconds": job.ended - job.began}
            for job in trainings
        }
        (out / "runs.json").write_text(json.dumps(said, indent=1) + "\n")
        with tarfile.open(out / "runs.tar.gz.tmp", "w:gz") as archive:
            for path in (self._runs / job.name / name for job in self.jobs for name in RETURNED):
                if path.is_file():
                    archive.add(path, path.relative_to(self._runs))
        (out / "runs.tar.gz.tmp").rename(out / "runs.tar.gz")


def _row(job: Job, figures: dict[str, Any]) -> str:
    def percent(key: str) -> str:
        return f"{figures[key]:.2%}" if key in figures else "–"

    memory = figures.get("memory_bytes")
    cells = [
        job.name,
        job.recipe,
        str(job.seed),
        figures.get("weights_at_start", "–"),
        percent("final_top1"),
        f"{percent('best_top1')} ({figures.get('best_epoch', 0):.0f})",
        percent("final_top5"),
        percent("train_top1"),
        f"{figures.get('epochs', 0):.0f}",
        f"{(job.ended - job.began) / 60:.1f}",
        f"{figures.get('images_per_second', 0):.0f}",
        "–" if memory is None else f"{memory / 1e9:.2f}",
        figures.get("stopped_because", job.fate) if job.fate == "finished" else job.fate,
    ]
    return f"| {' | '.join(cells)} |"


def _hardware() -> str:
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{card}, {len(os.sched_getaffinity(0))} cores"


def _environment() -> dict[str, str]:
    """One thread a worker: there are more processes than cores."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def read_plan(path: Path, data: Path, runs: Path, out: Path) -> list[Job]:
    """The jobs of a plan, a training with several seeds as one for each, named NAME-sSEED."""
    plan = yaml.safe_load(path.read_text())
    jobs = [job for training in plan["trainings"] for job in _trainings(training, data, runs)]
    for command in plan.get("commands", []):
        words = [word.format(runs=runs, data=data, out=out) for word in command["words"]]
        fields = {key: command[key] for key in ("name", "after", "alone") if key in command}
        jobs.append(Job(words=["-m", *words], minutes=command.get("minutes", 5), **fields))
    names = [job.name for job in jobs]
    if unknown := {name for job in jobs for name in job.after} - set(names):
        raise ValueError(f"{path}: no training is called {', '.join(sorted(unknown))}")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two jobs have the same name")
    return jobs


def _trainings(training: dict[str, Any], data: Path, runs: Path) -> list[Job]:
    start = training.get("checkpoint")
    jobs = []
    for seed in training.get("seeds", [0]):
        name = f"{training['name']}-s{seed}" if "seeds" in training else training["name"]
        words = ["-m", "train", f"configs/{training['recipe']}.yaml", f"data.path={data / training['data']}"]
        words += [f"run.folder={runs}", f"run.name={name}", f"run.seed={seed}", "run.preflight=false"]
        words += [f"data.num_workers={training.get('workers', 2)}", "tracking.mlflow=false"]
        words += [] if start is None else [f"model.checkpoint={runs / start}"]
        words += training.get("changes", [])
        jobs.append(
            Job(
                name,
                words,
                training.get("minutes", 15),
                after=[] if start is None else [start],
                data=data / training["data"],
                recipe=training["recipe"],
                seed=seed,
            )
        )
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the prepared data sets")
    parser.add_argument("--out", type=Path, required=True, help="for tables, figures and logs")
    parser.add_argument("--runs", type=Path, help="for run folders with checkpoints (default: OUT/runs)")
    parser.add_argument("--seconds", type=float, default=3600, help="for everything (default: an hour)")
    parser.add_argument("--parallel", type=int, default=8, help="jobs at once (default: 8)")
    parser.add_argument("--max-failures", type=int, default=3, help="with more, the rest is given up")
    options = parser.parse_args()
    for name in ("data", "out", "runs"):
        setattr(options, name, (getattr(options, name) or options.out / "runs").resolve())
    shutil.rmtree(options.out / "logs", ignore_errors=True)
    jobs = read_plan(options.plan, options.data, options.runs, options.out)
    num_failed = Queue(jobs, options).work()
    print((options.out / "table.md").read_text())
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
