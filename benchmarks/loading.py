"""Images a second of the loaders alone: ours against torchvision, FFCV and DALI, as their users run them.

    python benchmarks/loading.py --images ../shared/data/imagenet_samples

The images are copied over and over to a useful number, and prepared once in every form. All cases get the
same crops by distribution (area 0.08–1, aspect ratio 3/4–4/3, mirrored half of the time), the same batch size
and the same number of threads or workers, and end with uint8 batches in memory. Every run has a process of
its own; cases take turns, and medians are compared. In a run, a first epoch (start, compilation, page cache)
is not counted; then a whole epoch is timed, from its begin to its last batch. A first round, in which memory
is sampled too, does not count.

What is not the same, because it is not in its users' programs either:
- Ours draws crops by sample id, shuffles the whole epoch, and has checked every sample's CRC-32C by the end
  of the first epoch (shown apart). FFCV's stock shuffle is as wide, its crops are not seeded; DALI shuffles
  within a buffer of 1,024 samples. Ours hands out a copy of each batch; stock FFCV a buffer that it reuses.
- Filters: torchvision (on what Pillow reads) and DALI, also ours, triangular; FFCV and the rest of ours area.
  FFCV decodes with libjpeg's fast DCT. Batches of torchvision are NCHW, all others NHWC.
- The originals are larger than the prepared JPEGs (longest side 500, quality 90); compare within one form.
- There is no training beside: a loader that holds Python's GIL costs a training run more than is seen here.
- An epoch of few batches: who starts it anew (all but DALI, which reads ahead into the next) pays for
  this in every epoch; with ImageNet's 10,000 batches that is nothing.

Cold: the files are dropped from the page cache before a further epoch, as if the data were larger than the
memory. It is an imitation: the disk may have a cache of its own. The first batches of such an epoch, which a
loader may have read ahead, do not count.
Pause: time to the first batch of an epoch where the resolution changes, less that where it does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loading_cases import CASES, Job, Subject, UnavailableError, make_forms, open_case, versions
from loading_probe import PeakMemory, cpu_seconds, disk_bytes, drop_from_memory

PEERS = ("FFCV, stock", "DALI CPU, stock")
LONGEST_RUN_SECONDS = 300  # of one process; then it is said to hang
CHANGING_SIDES = (112, 128, 144, 160, 176, 192, 208, 224)
COLD_ROUNDS = 3
COLD_SKIPPED_BATCHES = 4  # what was read ahead before the cache was dropped
MAX_RESIDENT = 0.1  # share of the files in memory with which an epoch still passes for a cold one
SHARD_NAMES = ("train*.beton", "train-*.tar", "train/*/*")


@dataclass
class Results:
    """What was measured so far."""

    settings: dict[str, Any]
    rounds: dict[tuple[int, str], list[dict[str, float]]] = field(default_factory=dict)  # by side and case
    memory: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)
    change: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def median(self, side: int, case: str, key: str) -> float | None:
        values = [run[key] for run in self.rounds.get((side, case), []) if key in run]
        return statistics.median(values) if values else None


def main() -> None:
    options, began = _parsed(), time.perf_counter()
    if options.job:
        job = Job(**json.loads(options.job))
        try:
            subject = open_case(job)
            run = _measure_change(subject) if job.change else _measure(subject, job, began)
            subject.close()
        except UnavailableError as error:
            run = {"unavailable": str(error)}
        print(json.dumps(run))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = Results(_settings(options))
    with tempfile.TemporaryDirectory(prefix="loadbench-", dir=options.scratch) as folder:
        try:
            _say("preparing the images")
            make_forms(options.images, Path(folder), options.num_images, options.workers)
            _run_all(results, Path(folder), options)
        except KeyboardInterrupt:
            _say("interrupted: this is what was measured so far")
            results.settings["interrupted"] = True
    results.settings["minutes"] = round((time.perf_counter() - began) / 60, 1)
    _print_tables(results)
    if options.json:
        options.json.write_text(json.dumps(_as_json(results), indent=2) + "\n")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of images, one folder a class")
    parser.add_argument("--num-images", type=int, default=2560, help="an epoch's; whole batches of it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[224, 128])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cases", nargs="+", default=[""], help="only those with one of these in their name")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--resolution-change", action=switch, default=True, help="measure the pause")
    parser.add_argument("--cold", action=switch, default=True, help="measure without the page cache")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--scratch", type=Path, help="folder for the images (default: temporary)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.job:
        if not options.images or not options.images.is_dir():
            parser.error("--images must name a folder of images")
        options.num_images -= options.num_images % options.batch_size
        if options.num_images < 2 * options.batch_size or options.rounds < 1:
            parser.error("it takes a round, and --num-images of two batches or more")
        if options.cold and options.num_images < 2 * COLD_SKIPPED_BATCHES * options.batch_size:
            _say("no cold epochs: too few images for them")
            options.cold = False
    return options


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(),
        "versions": versions(),
        "images": options.images.name,
        "num_images": options.num_images,
        "rounds": options.rounds,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "resolutions": options.resolutions,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- the parent: whose turn it is


def _run_all(results: Results, data: Path, options: argparse.Namespace) -> None:
    cases = [case for case in CASES if any(part in case.name for part in options.cases)]
    for number in range(options.rounds + 1):
        for side in options.resolutions:
            for case in cases:
                job = _job(case.name, side, data, options)
                if options.cold and side == options.resolutions[0] and 1 <= number <= COLD_ROUNDS:
                    job = replace(job, cold=True)
                run = _in_process(job, results, sample_memory=number == 0)
                if run and number:
                    results.rounds.setdefault((side, case.name), []).append(run)
                if run:
                    speed = f"{run['images_per_second']:,.0f} images/s"
                    _say(f"round {number} of {options.rounds}, {side} px, {case.name}: {speed}")
    for case in cases if options.resolution_change else ():
        if case.backend:
            job = replace(_job(case.name, CHANGING_SIDES[0], data, options), change=True)
            if pauses := _in_process(job, results):
                results.change[case.name] = pauses
                _say(f"change of resolution, {case.name}: {pauses['pause_ms']:.0f} ms")


def _job(case: str, side: int, data: Path, options: argparse.Namespace) -> Job:
    return Job(case, side, str(data), options.num_images, options.batch_size, options.workers)


def _in_process(job: Job, results: Results, sample_memory: bool = False) -> dict[str, Any] | None:
    """Measure in a new process; None, and the reason to `results.skipped`, where that is not possible."""
    if job.case in results.skipped:
        return None
    words = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
    # A session of its own: Ctrl-C comes here alone, and the workers can be ended with their parent.
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        with PeakMemory(process.pid) if sample_memory else contextlib.nullcontext() as memory:
            output, errors = process.communicate(timeout=LONGEST_RUN_SECONDS)
    except subprocess.TimeoutExpired:
        output, errors = "", f"it hung for {LONGEST_RUN_SECONDS} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode or not output.strip():
        last_line = (errors.strip().splitlines() or ["without a word"])[-1]
        run = {"unavailable": f"failed: {last_line}".replace(job.data, "…")}
    else:
        run = json.loads(output.splitlines()[-1])
    if "unavailable" in run:
        results.skipped[job.case] = run["unavailable"]
        _say(f"skipped: {job.case}: {run['unavailable']}")
        return None
    if memory:
        results.memory[job.side, job.case] = {"own_mb": memory.own_mb, "mapped_mb": memory.mapped_mb}
    return run


# --- the child: one case


def _measure(subject: Subject, job: Job, began: float) -> dict[str, float]:
    start_seconds = _first_batch_seconds(subject.warm_up(), began)
    run: dict[str, float] = {"start_seconds": start_seconds}
    if subject.first_batches:
        run["first_epoch_images_per_second"] = _timed(subject, 0, job)["images_per_second"]
    run |= _timed(subject, 1, job)
    if job.cold:
        files = [path for name in SHARD_NAMES for path in (Path(job.data) / _form(job)).glob(name)]
        run["resident"] = drop_from_memory(files)
        run["data_mb"] = sum(path.stat().st_size for path in files) / 1e6
        if run["resident"] <= MAX_RESIDENT:
            cold = _timed(subject, 2, job, COLD_SKIPPED_BATCHES)
            run |= {f"cold_{key}": cold[key] for key in ("images_per_second", "disk_mb")}
    return run


def _form(job: Job) -> str:
    return next(case.form for case in CASES if case.name == job.case)


def _first_batch_seconds(batches: Iterable[Any], began: float) -> float:
    """Consume all; seconds from `began` to the first."""
    first = 0.0
    for images in batches:
        images.flatten()[0].item()
        first = first or time.perf_counter() - began
    return first


def _timed(subject: Subject, epoch: int, job: Job, skipped_batches: int = 0) -> dict[str, float]:
    """Consume an epoch; the time of the first `skipped_batches` does not count, nor do their images."""
    me, count, skipped = os.getpid(), 0, 0
    cpu, disk, began = cpu_seconds(me), disk_bytes(me), time.perf_counter()
    for number, images in enumerate(subject.epoch(epoch), 1):
        images[0, 0, 0, 0].item()
        assert sorted(images.shape[1:]) == [3, job.side, job.side], images.shape
        assert images.element_size() == 1
        count += len(images)
        if number == skipped_batches and count < job.num_images:
            skipped, began = count, time.perf_counter()
    seconds = time.perf_counter() - began
    assert count == job.num_images, f"{count} images in place of {job.num_images}"
    return {
        "images_per_second": (count - skipped) / seconds,
        "cpu_seconds_per_1000_images": (cpu_seconds(me) - cpu) / count * 1000,
        "disk_mb": (disk_bytes(me) - disk) / 1e6,
    }


def _measure_change(subject: Subject) -> dict[str, float]:
    """Medians over resolutions that come for the first time, each followed by an epoch with the same."""
    assert subject.first_batches is not None
    change, same = [], []
    for number, side in enumerate(CHANGING_SIDES):
        for seconds, epoch in ((change, 2 * number), (same, 2 * number + 1)):
            began = time.perf_counter()
            seconds.append(_first_batch_seconds(subject.first_batches(epoch, side), began))
    del change[0], same[0]  # the loader's start
    pauses = [new - old for new, old in zip(change, same, strict=True)]
    values = {"change_ms": change, "same_ms": same, "pause_ms": pauses}
    return {name: statistics.median(seconds) * 1e3 for name, seconds in values.items()}


# --- the tables


def _print_tables(results: Results) -> None:
    settings = results.settings
    print(
        f"\n{settings['num_images']:,} images from {settings['images']}, batches of "
        f"{settings['batch_size']}, {settings['workers']} threads or workers, medians of "
        f"{settings['rounds']} rounds in turn, {settings['date']}, {settings['machine']}; "
        + ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
        + "."
        + (" Interrupted: not all rounds were run." if settings.get("interrupted") else "")
    )
    for side in settings["resolutions"]:
        _print_speeds(results, side)
    _print_cold(results, settings["resolutions"][0])
    if results.change:
        print("\n| time to the first batch of an epoch, ms | same resolution | a new one | pause |")
        print("|---|---|---|---|")
        for case, ms in results.change.items():
            print(f"| {case} | {ms['same_ms']:.0f} | {ms['change_ms']:.0f} | {ms['pause_ms']:.0f} |")
    for case, reason in results.skipped.items():
        print(f"\nNot measured: {case}: {reason}.")


def _print_speeds(results: Results, side: int) -> None:
    print(
        f"\n| {side} px | images/s (min–max) | "
        + " | ".join(f"÷ {peer}" for peer in PEERS)
        + " | CPU s per 1,000 images | peak MB: PSS of all processes, own memory + mapped files"
        " | s to the first batch, imports included | first epoch (CRC), images/s |"
    )
    print("|---|---|" + "---|" * (len(PEERS) + 4))
    for (at, case), runs in results.rounds.items():
        if at == side:
            speeds = [run["images_per_second"] for run in runs]
            median = statistics.median(speeds)
            peers = [results.median(side, peer, "images_per_second") for peer in PEERS]
            memory = results.memory[side, case]
            cells = [f"{median:,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f})"]
            cells += [_number(peer and median / peer, ".2f") for peer in peers]
            cells += [_number(results.median(side, case, "cpu_seconds_per_1000_images"), ".2f")]
            cells += [f"{memory['own_mb']:,.0f} + {memory['mapped_mb']:,.0f}"]
            cells += [_number(results.median(side, case, "start_seconds"), ".1f")]
            cells += [_number(results.median(side, case, "first_epoch_images_per_second"), ",.0f")]
            print(f"| {case} | " + " | ".join(cells) + " |")


def _print_cold(results: Results, side: int) -> None:
    cases = [case for (at, case) in results.rounds if at == side]
    if not any(results.median(side, case, "resident") is not None for case in cases):
        return
    print(
        f"\n| {side} px, page cache dropped: an imitation of data larger than memory | images/s warm | cold "
        "| cold ÷ warm | MB of data | MB read from the disk | still in memory |"
    )
    print("|---|---|---|---|---|---|---|")
    for case in cases:
        warm = results.median(side, case, "images_per_second")
        cold = results.median(side, case, "cold_images_per_second")
        cells = [_number(warm, ",.0f"), _number(cold, ",.0f"), _number(cold and warm and cold / warm, ".2f")]
        cells += [_number(results.median(side, case, key), ",.0f") for key in ("data_mb", "cold_disk_mb")]
        cells += [_number(results.median(side, case, "resident"), ".0%")]
        print(f"| {case} | " + " | ".join(cells) + " |")
    if any(results.median(side, case, "cold_images_per_second") is None for case in cases):
        print("\nNo cold figure where worker processes keep the shards mapped: these cannot be dropped.")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _as_json(results: Results) -> dict[str, Any]:
    cases = [
        {"case": case, "resolution": side, "rounds": runs, "memory": results.memory.get((side, case))}
        for (side, case), runs in results.rounds.items()
    ]
    return {
        "settings": results.settings,
        "cases": cases,
        "resolution_change": results.change,
        "skipped": results.skipped,
    }


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {len(os.sched_getaffinity(0))} cores"
    return platform.processor()


if __name__ == "__main__":
    main()
