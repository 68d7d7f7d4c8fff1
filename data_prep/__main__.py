"""Command line of the data preparation: arguments only.

python -m data_prep download imagenette --out data/sources
python -m data_prep prepare --source ../shared/data/intel --out data/intel
python -m data_prep verify data/intel
python -m data_prep stats data/intel --audit
python -m data_prep copy s3://my-bucket/imagenet /mnt/nvme/imagenet
python -m data_prep generate --out data/synthetic-source

Sources and data sets may lie at s3://bucket/prefix. Beyond one machine:

torchrun --nnodes=4 … -m data_prep prepare --format dali --source s3://… --out s3://…
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from data_prep import download, stats
from data_prep.copying import copy_data_set
from data_prep.corrections import corrected, load_corrections
from data_prep.manifest import ImageSettings, Manifest
from data_prep.pipeline import PrepareOptions, prepare
from data_prep.ranks import rank_and_world_size
from data_prep.sources import LAYOUTS, Source, open_source
from data_prep.storage import is_s3
from data_prep.verify import verify
from data_prep.workers import keep_freed_memory

KEPT = {
    "prepare": "what is finished is kept; ",
    "copy": "what is copied is kept; ",
    "download": "what has come is kept; ",
}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _on_sigterm)  # leave as with Ctrl-C, and take the workers along
    rank, _ = rank_and_world_size()
    who = f"rank {rank}: " if rank else ""
    try:
        return int(options.run(options))
    except (ValueError, RuntimeError) as error:
        print(f"{who}error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{who}error: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = KEPT.get(options.command, "")
        print(f"\n{who}interrupted: {kept}the same command can be run again", file=sys.stderr)
        return 130


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep", description="image archive → verified shards, on a disk or in S3"
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=what)

    fetch = add("download", "fetch a public data set with your own credentials")
    download.add_arguments(fetch)
    fetch.set_defaults(run=download.run)
    _add_prepare(add("prepare", "source archive → shards, sample index and manifest"))
    check = add("verify", "check every file, checksum and image of a prepared data set")
    check.add_argument("folder", help="data set: a folder or s3://bucket/prefix")
    check.add_argument("--no-decode", action="store_true", help="compare checksums only")
    check.add_argument(
        "--sample", type=int, metavar="N", help="look at N images of each split (default: all)"
    )
    check.add_argument("--seed", type=int, default=0, help="of the choice that --sample makes")
    check.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    check.set_defaults(run=_run_verify)
    card = add("stats", "data card: class balance, sizes, a contact sheet; with --audit, duplicates")
    stats.add_arguments(card)
    card.set_defaults(run=stats.run)
    copied = add("copy", "copy a prepared data set between folders and S3, verified")
    copied.add_argument("source", help="data set: a folder or s3://bucket/prefix")
    copied.add_argument("target", help="where to: a folder or s3://bucket/prefix")
    copied.add_argument("--connections", type=int, default=16, help="ranges at once (default: 16)")
    copied.set_defaults(run=_run_copy)
    generated = add("generate", "write the embedded data set's source images")
    generated.add_argument("--out", type=Path, required=True)
    generated.add_argument("--seed", type=int, default=0)
    generated.add_argument("--num-images", type=int, default=2000)
    generated.set_defaults(run=_run_generate)
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run_prepare)
    add = parser.add_argument
    add("--source", required=True, help="folder, zip, tar or s3://bucket/prefix with the images")
    add("--out", required=True, help="folder or s3://bucket/prefix for the data set")
    add("--format", choices=["ffcv", "dali"], default="ffcv", help="shard format (default: ffcv)")
    add("--layout", help=f"source layout, one of {', '.join(LAYOUTS)} (default: detect it)")
    add("--val-fraction", type=float, default=0.2, help="where the source has no split (default: 0.2)")
    add("--classes", nargs="+", default=[], metavar="NAME", help="only these; @FILE: a name a line")
    add("--max-per-class", type=int, metavar="N", help="at most N images of a class in each split")
    add("--seed", type=int, default=0, help="of the split, the choice and the order on the disk")
    add("--resolution-cap", type=int, default=500, metavar="PIXELS", help="default: 500; 0: none")
    add("--cap-side", choices=["longest", "shortest"], default="longest", help="which the cap is for")
    add(
        "--encode",
        choices=["q90", "lossless"],
        default="q90",
        help="lossless: baseline JPEGs within the cap keep their bytes (default: q90, all encoded once)",
    )
    add("--quality", type=int, default=90, help="JPEG quality (default: 90)")
    add("--subsampling", choices=["420", "444"], default="420", help="chroma; 444 for tiny images")
    add("--apply-exif", action="store_true", help="turn images as their EXIF orientation says")
    add("--shard-mb", type=int, default=256, metavar="MB", help="size of a tar, about (default: 256)")
    add("--workers", type=int, default=0, help="processes (default: one a core)")
    add(
        "--corrections",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="of a label audit: images to leave out, and images of another class",
    )
    add("--max-bad-fraction", type=float, default=0.05, help="stop beyond it (default: 0.05)")


def _run_prepare(options: argparse.Namespace) -> int:
    if not 1 <= options.quality <= 100:
        raise ValueError(f"--quality is {options.quality}: it must be from 1 to 100")
    if not 0 <= options.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction is {options.max_bad_fraction}: it must be from 0 to 1")
    if options.resolution_cap and not 8 <= options.resolution_cap <= 65535:
        raise ValueError(f"--resolution-cap is {options.resolution_cap}: it must be 0 or from 8 to 65535")
    if not 1 <= options.shard_mb <= 65536:
        raise ValueError(f"--shard-mb is {options.shard_mb}: it must be from 1 to 65536")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}: it must be at least 0")
    _check_workers(options)
    _check_apart(options.source, options.out)
    rank, world_size = rank_and_world_size()
    source = open_source(
        options.source,
        options.layout,
        options.val_fraction,
        options.seed,
        classes=_class_names(options.classes),
        max_per_class=options.max_per_class,
    )
    if rank == 0:
        _describe(source, options.source)
    if options.corrections:
        found = [correction for path in options.corrections for correction in load_corrections(path)]
        source, words = corrected(source, found)
        if rank == 0:
            print(words, flush=True)
    images = ImageSettings(
        encode=options.encode,
        resolution_cap=options.resolution_cap or None,
        cap_side=options.cap_side,
        quality=options.quality,
        subsampling=options.subsampling,
        apply_exif=options.apply_exif,
    )
    manifest = prepare(
        source,
        PrepareOptions(
            out=options.out,
            format=options.format,
            images=images,
            seed=options.seed,
            num_workers=options.workers,
            max_bad_fraction=options.max_bad_fraction,
            shard_bytes=options.shard_mb << 20,
            progress=rank == 0,
            rank=rank,
            world_size=world_size,
        ),
    )
    if manifest is not None:
        _summarize(manifest, options.out)
    return 0


def _check_workers(options: argparse.Namespace) -> None:
    if not 0 <= options.workers <= 1024:
        raise ValueError(f"--workers is {options.workers}: it must be from 0 (one a core) to 1024")


def _check_apart(source: str, out: str) -> None:
    """Before anything is listed: an output in the source would be taken for a class the next time."""
    if is_s3(out):
        inside = is_s3(source) and f"{out.rstrip('/')}/".startswith(f"{source.rstrip('/')}/")
    else:
        if Path(out).exists() and not Path(out).is_dir():
            raise ValueError(f"--out {out} is a file: choose a folder")
        place = Path(source).resolve()
        inside = not is_s3(source) and (place == Path(out).resolve() or place in Path(out).resolve().parents)
    if inside:
        raise ValueError(f"--out {out} lies in the source {source}: choose a folder outside of it")


def _class_names(arguments: list[str]) -> tuple[str, ...]:
    names: list[str] = []
    for argument in arguments:
        if argument.startswith("@"):
            lines = Path(argument[1:]).read_text(encoding="utf-8").splitlines()
            names += [line.strip() for line in lines if line.strip()]
        else:
            names.append(argument)
    return tuple(names)


def _describe(source: Source, location: str) -> None:
    print(
        f"recognised {location} as {source.layout} ({source.description}): {len(source.class_names)} "
        f"classes, {source.count('train'):,} train and {source.count('val'):,} val files",
        flush=True,
    )
    for warning in source.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _summarize(manifest: Manifest, out: str) -> None:
    print(
        f"prepared {_splits(manifest)} images in {out} ({manifest.num_bytes / 1e6:,.1f} MB); "
        f"{manifest.num_found:,} found = {manifest.num_found - manifest.num_quarantined:,} prepared + "
        f"{manifest.num_quarantined:,} quarantined"
    )
    for reason, count in manifest.quarantined_by_reason.items():
        print(f"  quarantined {count} × {reason}")


def _splits(manifest: Manifest) -> str:
    return ", ".join(f"{entry.num_samples:,} {name}" for name, entry in manifest.splits.items())


def _run_verify(options: argparse.Namespace) -> int:
    if options.sample is not None and options.sample < 1:
        raise ValueError(f"--sample is {options.sample}: it must be at least 1")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}: it must be at least 0")
    _check_workers(options)
    manifest, faults = verify(
        options.folder,
        decode=not options.no_decode,
        num_samples=options.sample,
        seed=options.seed,
        num_workers=options.workers,
    )
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        return 1
    looked = f" ({options.sample:,} images a split were looked at)" if options.sample else ""
    print(
        f"{options.folder} is whole: {_splits(manifest)} images in {manifest.num_classes} classes, all "
        f"checksums agree{looked}"
    )
    return 0


def _run_copy(options: argparse.Namespace) -> int:
    if not 1 <= options.connections <= 256:
        raise ValueError(f"--connections is {options.connections}: it must be from 1 to 256")
    result = copy_data_set(options.source, options.target, options.connections)
    print(
        f"{options.target} holds {_splits(result.manifest)} images, all checksums agree; copied "
        f"{result.copied_bytes / 1e6:,.1f} MB in {result.seconds:,.1f} s "
        f"({result.copied_bytes / 1e6 / max(result.seconds, 1e-9):,.0f} MB/s), "
        f"{result.kept_bytes / 1e6:,.1f} MB were there already"
    )
    return 0


def _run_generate(options: argparse.Namespace) -> int:
    from data_prep.synthetic import generate

    generate(options.out, seed=options.seed, num_images=options.num_images)
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
