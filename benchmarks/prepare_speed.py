"""Images a second that preparation writes: ours against FFCV's own DatasetWriter, in one run.

    python benchmarks/prepare_speed.py --images ../shared/data/imagenet_samples

The images are repeated (as links) to a useful size. Each writer gets the same files, the same cap (longest
side 500), quality 90 and the same number of workers; they take turns, every run in a process of its own, and
the medians are compared. Ours is timed as the whole of `prepare`: listing, strict decoding, checksums,
flushing to the disk and reading back; FFCV's as its `from_indexed_dataset` call alone. A first round, which
warms the page cache, is not counted. Interpreter start and imports count for neither.

The bounds are what libjpeg-turbo itself takes for these images, in as many threads, from memory to memory,
with no resizing, no file and no checksum: no writer that decodes every image with it can be faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = (
    "ffcv DatasetWriter",
    "ours q90 → .beton",
    "ours q90 → tars",
    "ours lossless → .beton",
    "bound: libjpeg-turbo decode + encode alone",
    "bound: entropy decoding alone (⅛ size)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images, one folder a class")
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="folder for what is written (default: temporary)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(_measure(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        source = _repeated(options.images, Path(folder) / "source", options.num_images)
        results: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
        for number in range(options.rounds + 1):
            for case in CASES:
                result = _in_process(case, source, Path(folder) / "out", options)
                if number:
                    results[case].append(result)
                print(f"round {number}: {case}: {result['images_per_second']:.0f} img/s", file=sys.stderr)
    _print_table(results, options)


def _repeated(images: Path, folder: Path, num_images: int) -> Path:
    files = sorted(path for path in images.rglob("*") if path.is_file())
    for number in range(num_images):
        original = files[number % len(files)]
        target = folder / original.parent.name / f"{number // len(files):05d}_{original.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(original.resolve())
    return folder


def _in_process(case: str, source: Path, out: Path, options: argparse.Namespace) -> dict[str, float]:
    words = [sys.executable, __file__, "--case", case, "--images", str(source), "--scratch", str(out)]
    words += ["--workers", str(options.workers)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(options: argparse.Namespace) -> dict[str, float]:
    options.scratch.mkdir(parents=True)
    before = time.process_time()
    kind = options.case.partition(" ")[0]
    seconds, count = {"ffcv": _ffcv, "ours": _ours, "bound:": _bound}[kind](options)
    main_seconds = time.process_time() - before
    size = sum(path.stat().st_size for path in options.scratch.rglob("*") if path.is_file())
    return {
        "images_per_second": count / seconds,
        "megabytes": size / 1e6,
        "main_ms": main_seconds / count * 1e3,
        "main_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _ours(options: argparse.Namespace) -> tuple[float, int]:
    from data_prep.manifest import ImageSettings
    from data_prep.pipeline import PrepareOptions, prepare
    from data_prep.sources import open_source
    from data_prep.workers import keep_freed_memory

    keep_freed_memory()  # as the command does
    began = time.perf_counter()
    # Nearly all to train: FFCV writes one file, too.
    source = open_source(str(options.images), val_fraction=0.001)
    manifest = prepare(
        source,
        PrepareOptions(
            out=options.scratch,
            format="dali" if "tars" in options.case else "ffcv",
            images=ImageSettings(encode="lossless" if "lossless" in options.case else "q90"),
            num_workers=options.workers,
            progress=False,
        ),
    )
    seconds = time.perf_counter() - began
    assert manifest is not None and manifest.num_quarantined == 0
    return seconds, manifest.num_found


def _ffcv(options: argparse.Namespace) -> tuple[float, int]:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    data_set = ImageFolder(str(options.images))
    fields = {
        "image": RGBImageField(write_mode="jpg", max_resolution=500, jpeg_quality=90),
        "label": IntField(),
    }
    began = time.perf_counter()
    writer = DatasetWriter(str(options.scratch / "train.beton"), fields, num_workers=options.workers)
    writer.from_indexed_dataset(data_set, shuffle_indices=True)
    return time.perf_counter() - began, len(data_set)


def _bound(options: argparse.Namespace) -> tuple[float, int]:
    from concurrent.futures import ThreadPoolExecutor

    import simplejpeg

    def decode_and_encode(content: bytes) -> None:
        pixels = simplejpeg.decode_jpeg(content, strict=False)
        simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")

    def entropy(content: bytes) -> None:
        simplejpeg.decode_jpeg(content, strict=False, min_height=1, min_width=1, min_factor=8)

    files = [path.resolve() for path in sorted(options.images.rglob("*")) if path.is_file()]
    contents = {path: path.read_bytes() for path in set(files)}
    action = entropy if "entropy" in options.case else decode_and_encode
    with ThreadPoolExecutor(options.workers) as pool:
        began = time.perf_counter()
        for _ in pool.map(lambda path: action(contents[path]), files):
            pass
        return time.perf_counter() - began, len(files)


def _print_table(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    print(
        f"\n{options.num_images:,} images from {options.images.name}, {options.workers} processes, medians "
        f"of {options.rounds} rounds in turn, {time.strftime('%Y-%m-%d')}, {_machine()}\n"
    )
    print("| writer | images/s (min–max) | ratio | MB written | main process, CPU ms/image | its peak MB |")
    print("|---|---|---|---|---|---|")
    peer = statistics.median(r["images_per_second"] for r in results[CASES[0]])
    for case, runs in results.items():
        speeds = [r["images_per_second"] for r in runs]
        median = statistics.median(speeds)
        main_ms = statistics.median(r["main_ms"] for r in runs)
        print(
            f"| {case} | {median:,.0f} ({min(speeds):,.0f}–{max(speeds):,.0f}) | {median / peer:.2f} | "
            f"{runs[0]['megabytes']:,.0f} | {main_ms:.2f} | {max(r['main_mb'] for r in runs):,.0f} |"
        )


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {len(os.sched_getaffinity(0))} cores"
    return platform.processor()


if __name__ == "__main__":
    main()
