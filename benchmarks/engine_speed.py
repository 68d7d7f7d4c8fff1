"""Images a second of whole training steps: our command against timm's and torchvision's.

    python benchmarks/engine_speed.py --timm-source ../pytorch-image-models \\
        --torchvision-source ../vision/references/classification

The same model, batch size, precision, optimizer (SGD with momentum and weight decay) and label smoothing, on
batches that lie in memory, so that no loader is measured. Each system runs its own program, unchanged, from
its own command line: its step, its meters, its log lines; `engine_cases.py` says what is put in place of its
data. Every run has a process of its own, systems take turns, medians are compared. The first steps of a run
do not count (allocation, compilation, cuDNN's choice of algorithms).

`bare` is the step that no loop can leave out: what the others lose against it is their overhead. `ours-real`
is ours on prepared data through its own loader; it should reach 0.97 of `ours`, unless decoding and training
share the same cores. CPU seconds are those of the process between the same two steps: on a busy machine they
tell more than images a second, best with --threads 1.

Modes: `default` is the command of each system's documentation. `tuned` adds what a system offers without
compiling (timm: --channels-last, on CUDA a fused optimizer; ours and the bare step are always so). `compiled`
adds --torchcompile, or ours and the bare step model.compile=true.

What is not the same, because it is not in their users' programs either:
- timm normalizes on the device, as ours does; torchvision's batches come normalized, as float32 (four times
  the bytes to copy), from its workers, whose time is not counted.
- timm reads the loss back in every step; torchvision the loss, top-1 and top-5; ours in logging steps only.
- Ours counts top-1 and top-5 of the training batches, takes the norm of the gradients, and leaves a step out
  whose loss or gradient is not finite; timm does none of it, torchvision counts top-1 and top-5.
- torchvision's reference knows fp16 (CUDA) and fp32, neither channels-last nor compilation.
- Decay of norms and biases: ours and timm leave them out, torchvision does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_cases import NUM_CLASSES, SYSTEMS, Job
from PIL import Image

PEERS = ("timm", "torchvision")
LONGEST_RUN_SECONDS = 900  # of one process; then it is said to hang
PICTURE_SIZE = (500, 375)
NUM_PICTURES = 64  # different ones; the files of the generated data set are links to them
WANTED_OF_PEER, WANTED_OF_SYNTHETIC = 1.0, 0.97


@dataclass
class Results:
    """What was measured so far, by (side, precision, mode) and system."""

    settings: dict[str, Any]
    speeds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    unavailable: dict[tuple[str, str], str] = field(default_factory=dict)
    profiles: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def median(self, setting: str, system: str) -> float | None:
        speeds = self.speeds.get((setting, system))
        return statistics.median(speeds) if speeds else None


def main() -> None:
    options, began = _parsed(), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        data = options.data or _generated_data(Path(scratch), options.num_images)
        results = Results(_settings(options))
        jobs = _jobs(options, str(data), scratch)
        for number in range(options.rounds):
            for job in jobs:
                _measure(job, results, number)
        if options.profile:
            for job in jobs:
                if job.system == "ours":
                    _measure(replace(job, profile=True), results, options.rounds)
    print(_tables(results))
    print(f"{(time.perf_counter() - began) / 60:.0f} minutes")
    if options.json:
        Path(options.json).write_text(json.dumps(_as_tree(results), indent=1) + "\n")


def _parsed() -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--timm-source", help="folder with timm's train.py, e.g. a checkout; without it timm is left out")
    add("--torchvision-source", help="the folder references/classification of torchvision's repository")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add("--modes", nargs="+", choices=("default", "tuned", "compiled"))
    add("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"))
    add("--sides", nargs="+", type=int, default=[224, 160] if has_gpu else [64], help="pixels")
    add("--model", default="resnet50" if has_gpu else "resnet18", help="known to timm and torchvision")
    add("--batch-size", type=int, default=256 if has_gpu else 64)
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=110 if has_gpu else 30, help="of a run, with those that do not count")
    add("--skipped-steps", type=int, default=10 if has_gpu else 5)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)) if has_gpu else 2)
    add("--data", help="a prepared data set with the images for ours-real; else one is generated")
    add("--num-images", type=int, default=20_000 if has_gpu else 2_000, help="of the generated one")
    add("--scratch", help="folder for temporary files, on a fast disk")
    add("--profile", action="store_true", help="of ours, one more run under torch's profiler")
    add("--json", help="file for all figures")
    options = parser.parse_args()
    options.device = "cuda" if has_gpu else "cpu"
    options.modes = options.modes or (["default", "compiled"] if has_gpu else ["default", "tuned"])
    options.precisions = options.precisions or (["bf16", "fp16"] if has_gpu else _cpu_precisions())
    if not 0 < options.skipped_steps < options.steps:
        parser.error("--skipped-steps must be fewer than --steps, and at least 1")
    for name in PEERS:
        source = getattr(options, f"{name}_source")
        if source and not (Path(source) / "train.py").is_file():
            parser.error(f"--{name}-source: there is no train.py in {source}")
        if not source and name in options.systems:
            options.systems.remove(name)
    if options.data:
        manifest = json.loads((Path(options.data) / "manifest.json").read_text(encoding="utf-8"))
        if len(manifest["class_names"]) < NUM_CLASSES:
            parser.error(f"--data must have {NUM_CLASSES} classes: labels are drawn from as many")
    return options


def _cpu_precisions() -> list[str]:
    """bf16 only where the processor computes it: emulated, it tells nothing."""
    from train.precision import choose_precision

    return sorted({"fp32", choose_precision("auto", torch.device("cpu"))}, reverse=True)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    import timm
    import torchvision

    hardware = torch.cuda.get_device_name() if options.device == "cuda" else _cpu_name()
    versions = f"torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}"
    shown = ("model", "batch_size", "rounds", "steps", "skipped_steps", "threads", "data")
    return {"hardware": hardware, "versions": versions} | {name: getattr(options, name) for name in shown}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def _jobs(options: argparse.Namespace, data: str, scratch: str) -> list[Job]:
    """One round, system after system within a setting."""
    sources = {name: getattr(options, f"{name}_source") for name in PEERS}
    return [
        Job(
            system=system,
            mode=mode,
            precision=precision,
            model=options.model,
            side=side,
            batch_size=options.batch_size,
            num_skipped=options.skipped_steps,
            num_steps=options.steps,
            device=options.device,
            num_threads=options.threads,
            data=data,
            scratch=scratch,
            sources={name: str(Path(source).resolve()) for name, source in sources.items() if source},
        )
        for side in options.sides
        for precision in options.precisions
        for mode in options.modes
        for system in options.systems
    ]


def _setting(job: Job) -> str:
    return f"{job.side} px, {job.precision}, {job.mode}"


def _measure(job: Job, results: Results, number: int) -> None:
    """Run one process, and note what it found."""
    key = (_setting(job), job.system)
    if key in results.unavailable:
        return
    with tempfile.TemporaryDirectory(dir=job.scratch) as folder:
        outcome = _outcome(replace(job, scratch=folder))
    if "unavailable" in outcome:
        results.unavailable[key] = outcome["unavailable"]
        print(f"{key[0]}: {job.system} left out: {outcome['unavailable']}", file=sys.stderr, flush=True)
        return
    if "profile" in outcome:
        results.profiles[key] = outcome["profile"]
        return
    results.speeds[key].append(outcome["images_per_second"])
    results.cpu_seconds[key].append(outcome["cpu_seconds_a_thousand"])
    speed = outcome["images_per_second"]
    print(f"round {number + 1}: {key[0]}, {job.system}: {speed:,.1f} images/s", file=sys.stderr, flush=True)


def _outcome(job: Job) -> dict[str, Any]:
    """The result of one process, or why there is none."""
    job_path, result_path = (Path(job.scratch) / name for name in ("job.json", "result.json"))
    job_path.write_text(json.dumps(asdict(job)))
    program = Path(__file__).with_name("engine_cases.py")
    variables = os.environ | {"OMP_NUM_THREADS": str(job.num_threads)}
    try:
        done = subprocess.run(
            [sys.executable, str(program), str(job_path), str(result_path)],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST_RUN_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"unavailable": f"still at work after {LONGEST_RUN_SECONDS} s"}
    found = json.loads(result_path.read_text()) if result_path.is_file() else {}
    if not found or "unavailable" in found:
        print(done.stdout[-3000:], file=sys.stderr) if not found else None
        return found or {"unavailable": f"ended with code {done.returncode}: see above"}
    return found


def _generated_data(folder: Path, num_images: int) -> Path:
    """Smooth random pictures of ImageNet's size and classes, prepared as a user would."""
    from data_prep.pipeline import PrepareOptions, prepare
    from data_prep.sources import open_source

    generator = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(NUM_PICTURES):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(PICTURE_SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + generator.normal(0, 8, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(pictures / f"{number}.jpg", quality=90)
    for split, a_class in (("train", max(1, num_images // NUM_CLASSES)), ("val", 1)):
        for label in range(NUM_CLASSES):
            target = folder / "source" / split / f"n{label:08d}"
            target.mkdir(parents=True)
            for number in range(a_class):
                picture = pictures / f"{(label * a_class + number) % NUM_PICTURES}.jpg"
                os.link(picture, target / f"{number}.jpg")
    prepare(open_source(folder / "source"), PrepareOptions(out=folder / "data", progress=False))
    return folder / "data"


def _tables(results: Results) -> str:
    settings = results.settings
    counted = f"steps {settings['skipped_steps']} to {settings['steps']} of each run"
    trained = f"{settings['model']}, batch {settings['batch_size']}, {settings['threads']} thread(s)"
    lines = [
        f"{settings['hardware']}; {settings['versions']}; {trained}; {counted}; rounds: {settings['rounds']}",
        "",
        "| | | images/s (min–max) | ÷ faster peer | ÷ bare step | CPU s per 1,000 images |",
        "|---|---|---|---|---|---|",
    ]
    measured = list(results.speeds)
    for setting in dict.fromkeys(setting for setting, _ in measured):
        peers = [speed for name in PEERS if (speed := results.median(setting, name))]
        bare = results.median(setting, "bare")
        for system in [system for other, system in measured if other == setting]:
            speeds = results.speeds[setting, system]
            median = statistics.median(speeds)
            spread = f"{median:,.1f} ({min(speeds):,.1f}–{max(speeds):,.1f})"
            shares = [f"{median / other:.3f}" if other else "–" for other in (max(peers, default=None), bare)]
            cpu = statistics.median(results.cpu_seconds[setting, system])
            lines.append(f"| {setting} | {system} | {spread} | {' | '.join(shares)} | {cpu:.2f} |")
    return "\n".join([*lines, "", *_verdicts(results), *_profile_lines(results)])


def _verdicts(results: Results) -> list[str]:
    """Whether the aims are met, setting by setting."""
    lines = []
    for setting in dict.fromkeys(setting for setting, _ in results.speeds):
        ours, real = results.median(setting, "ours"), results.median(setting, "ours-real")
        peers = [speed for name in PEERS if (speed := results.median(setting, name))]
        if ours and peers:
            word = "met" if ours >= WANTED_OF_PEER * max(peers) else "NOT met"
            lines.append(f"{setting}: not slower than the faster peer: {word} ({ours / max(peers):.3f})")
        if ours and real:
            word = "met" if real >= WANTED_OF_SYNTHETIC * ours else "NOT met"
            lines.append(
                f"{setting}: real data at {WANTED_OF_SYNTHETIC} of synthetic: {word} ({real / ours:.3f})"
            )
    return lines


def _profile_lines(results: Results) -> list[str]:
    lines = []
    for (setting, system), profile in results.profiles.items():
        busy = profile["device_busy_fraction"]
        shown = f", device busy {busy:.1%}" if busy is not None else ""
        lines += [
            "",
            f"{setting}, {system}: {profile['milliseconds_a_step']:.1f} ms a step{shown}; the largest:",
        ]
        lines += [f"  {spent:8.3f} ms  {name}" for name, spent in profile["operations"].items()]
    return lines


def _as_tree(results: Results) -> dict[str, Any]:
    return {
        "settings": results.settings,
        "images_per_second": {" | ".join(key): speeds for key, speeds in results.speeds.items()},
        "cpu_seconds_a_thousand": {" | ".join(key): spent for key, spent in results.cpu_seconds.items()},
        "unavailable": {" | ".join(key): why for key, why in results.unavailable.items()},
        "profiles": {" | ".join(key): profile for key, profile in results.profiles.items()},
    }


if __name__ == "__main__":
    main()
