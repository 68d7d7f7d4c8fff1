"""Command line of the data preparation: arguments only.

python -m data_prep prepare --source ../shared/data/intel --out data/intel
python -m data_prep verify data/intel
python -m data_prep generate --out data/synthetic-source
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from data_prep.manifest import ImageSettings, Manifest
from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import LAYOUTS, Source, open_source
from data_prep.verify import verify


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="image archive → verified shards"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_prepare(commands.add_parser("prepare", help="source archive → shards, sample index and manifest"))
    check = commands.add_parser("verify", help="check every file, checksum and image of a prepared data set")
    check.add_argument("folder", type=Path)
    check.add_argument("--no-decode", action="store_true", help="compare checksums only")
    generated = commands.add_parser("generate", help="write the embedded data set's source images")
    generated.add_argument("--out", type=Path, required=True)
    generated.add_argument("--seed", type=int, default=0)
    generated.add_argument("--num-images", type=int, default=2000)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _on_sigterm)  # leave as with Ctrl-C, and take the workers along
    try:
        if options.command == "prepare":
            return _run_prepare(options)
        if options.command == "verify":
            return _run_verify(options)
        from data_prep.synthetic import generate

        generate(options.out, seed=options.seed, num_images=options.num_images)
        return 0
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'file system'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "finished splits are kept; " if options.command == "prepare" else ""
        print(f"\ninterrupted: {kept}the same command can be run again", file=sys.stderr)
        return 130


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, help="folder with the images")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data set")
    parser.add_argument("--format", choices=["ffcv"], default="ffcv", help="shard format (default: ffcv)")
    parser.add_argument("--layout", help=f"source layout, one of {', '.join(LAYOUTS)} (default: detect it)")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="where the source has no split")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the order on the disk")
    parser.add_argument("--resolution-cap", type=int, default=500, help="longest side in pixels; 0: none")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality (default: 90)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    parser.add_argument("--max-bad-fraction", type=float, default=0.05, help="stop beyond it (default: 0.05)")


def _run_prepare(options: argparse.Namespace) -> int:
    if not 1 <= options.quality <= 100:
        raise ValueError(f"--quality is {options.quality}: it must be from 1 to 100")
    if not 0 <= options.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction is {options.max_bad_fraction}: it must be from 0 to 1")
    if options.resolution_cap and not 8 <= options.resolution_cap <= 65535:
        raise ValueError(f"--resolution-cap is {options.resolution_cap}: it must be 0 or from 8 to 65535")
    source = open_source(str(options.source), options.layout, options.val_fraction, options.seed)
    _describe(source, options.source)
    images = ImageSettings(resolution_cap=options.resolution_cap or None, quality=options.quality)
    manifest = prepare(
        source,
        PrepareOptions(
            out=options.out,
            images=images,
            seed=options.seed,
            num_workers=options.workers,
            max_bad_fraction=options.max_bad_fraction,
        ),
    )
    _summarize(manifest, options.out)
    return 0


def _describe(source: Source, path: Path) -> None:
    print(
        f"recognised {path} as {source.layout} ({source.description}): {len(source.class_names)} classes, "
        f"{source.count('train'):,} train and {source.count('val'):,} val files"
    )
    for warning in source.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _summarize(manifest: Manifest, out: Path) -> None:
    splits = ", ".join(f"{entry.num_samples:,} {name}" for name, entry in manifest.splits.items())
    print(
        f"prepared {splits} images in {out} ({manifest.num_bytes / 1e6:,.1f} MB); "
        f"{manifest.num_found:,} found = {manifest.num_found - manifest.num_quarantined:,} prepared + "
        f"{manifest.num_quarantined:,} quarantined"
    )
    for reason, count in manifest.quarantined_by_reason.items():
        print(f"  quarantined {count} × {reason}")


def _run_verify(options: argparse.Namespace) -> int:
    manifest, faults = verify(options.folder, decode=not options.no_decode)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        return 1
    splits = ", ".join(f"{entry.num_samples:,} {name}" for name, entry in manifest.splits.items())
    print(
        f"{options.folder} is whole: {splits} images in {manifest.num_classes} classes, all checksums agree"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
