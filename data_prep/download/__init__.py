"""`python -m data_prep download`: fetch a source with your own credentials, to a disk or to S3.

    python -m data_prep download imagenette --size 320 --out data
    python -m data_prep download imagenet-hf --out s3://my-bucket/imagenet-hf --scratch /mnt/nvme

What was interrupted, however it died, goes on when the same command is run again: archives and Kaggle's zip
at the byte where they stopped, Hugging Face at the file (about 0.5 GB each), because its client deletes the
part of a file that broke off. Checksums are compared where there are any. Credentials are read by the
owners' clients (kagglehub, huggingface_hub); they are neither printed nor stored here.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from data_prep.download import archives
from data_prep.download.room import readable_bytes, require_room
from data_prep.download.transfer import RemoteFile
from data_prep.storage import LocalFolder, exclusive_lock, is_s3, open_folder

IMAGENET = ("imagenet-kaggle", "imagenet-hf")
SOURCES = (*IMAGENET, *archives.NAMES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", choices=SOURCES, help="what to fetch")
    parser.add_argument("--out", required=True, help="folder or s3://bucket/prefix to put it in")
    parser.add_argument(
        "--size",
        choices=archives.SIZES,
        help="of imagenette and imagewoof: shorter side in pixels (default: 320)",
    )
    parser.add_argument("--url", help="take the archive of imagenette, imagewoof or cifar10 from this mirror")
    parser.add_argument(
        "--md5", help="of that archive, where it is not the published one; none: do not compare any"
    )
    parser.add_argument(
        "--with-test",
        action="store_true",
        help="imagenet-hf: also the test split, which has no labels (13 GB)",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        help="for --out s3://: folder for what is on its way (default: the temporary one)",
    )


def run(options: argparse.Namespace) -> int:
    """Fetch it and print the command that comes next.

    Raises:
        ValueError: options that do not go together.
        RuntimeError: refused credentials, too little disk, a wrong checksum, a server that stays away.
    """
    _check(options)
    try:
        fetched = _to_s3(options) if is_s3(options.out) else _to_disk(options)
    except KeyboardInterrupt:
        print("\ninterrupted: what has come is kept; the same command goes on from there", file=sys.stderr)
        return 130
    prepared = f"{fetched.removesuffix('.zip')}-prepared"
    print(f"next: python -m data_prep prepare --source {shlex.quote(fetched)} --out {shlex.quote(prepared)}")
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.size and options.source not in archives.SIZED:
        raise ValueError(f"--size goes with {' and '.join(archives.SIZED)}: {options.source} has one size")
    if (options.url or options.md5) and options.source in IMAGENET:
        where = (
            "HF_ENDPOINT redirects it" if options.source == "imagenet-hf" else "kagglehub knows the address"
        )
        raise ValueError(f"--url and --md5 go with {', '.join(archives.NAMES)}; {where}")
    if options.with_test and options.source != "imagenet-hf":
        raise ValueError("--with-test goes with imagenet-hf")
    if options.scratch and not is_s3(options.out):
        raise ValueError("--scratch goes with --out s3://: on a disk, --out itself holds what is on its way")


def _archive(options: argparse.Namespace) -> archives.Archive:
    return archives.choose(options.source, options.size, options.url, options.md5)


def _remote_files(options: argparse.Namespace, work: Path) -> list[RemoteFile]:
    """The files of a source that stays as it comes. Its client is needed from here on."""
    if options.source == "imagenet-hf":
        from data_prep.download import hub

        return hub.remote_files(work / ".download", options.with_test)
    from data_prep.download import kaggle

    return kaggle.remote_files()


def _to_disk(options: argparse.Namespace) -> str:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with LocalFolder(out).lock():
        if options.source not in IMAGENET:
            archive = _archive(options)
            return str(archives.fetch_and_unpack(archive, out))
        if options.source == "imagenet-kaggle":
            from data_prep.download import kaggle

            # Before anything is asked: what has its name is whole, and needs no credentials any more.
            if (out / kaggle.ZIP_NAME).is_file():
                print(f"{out / kaggle.ZIP_NAME} is already there")
                return str(out / kaggle.ZIP_NAME)
        files = _remote_files(options, out)
        missing = [file for file in files if not _is_on_disk(out / file.name, file)]
        if len(missing) < len(files):
            print(f"{len(files) - len(missing)} of {len(files)} files are already in {out}")
        _announce(missing, out, sum(file.num_bytes or 0 for file in missing))
        for number, file in enumerate(missing, start=1):
            (out / file.name).parent.mkdir(parents=True, exist_ok=True)
            file.fetch(out / file.name, f"[{number} of {len(missing)}] {file.name}")
        shutil.rmtree(out / ".download", ignore_errors=True)
        return str(out / files[0].name) if options.source == "imagenet-kaggle" else str(out)


def _to_s3(options: argparse.Namespace) -> str:
    from data_prep.download import upload

    folder = open_folder(options.out)
    # One place for each source and size, so that the next run finds what this one leaves.
    scratch = options.scratch or Path(tempfile.gettempdir())
    work = scratch / "imagenet-sprint-download" / f"{options.source}-{options.size or archives.DEFAULT_SIZE}"
    work.mkdir(parents=True, exist_ok=True)
    with folder.lock() as still_ours, exclusive_lock(work):
        if options.source not in IMAGENET:
            archive = _archive(options)
            if upload.tree_is_there(folder, archive.folder):
                print(f"{folder.path_of(archive.folder)} is already there")
            else:
                upload.upload_tree(
                    folder, archives.fetch_and_unpack(archive, work), archive.folder, still_ours
                )
            fetched = folder.path_of(archive.folder)
        else:
            files = _remote_files(options, work)
            missing = upload.missing_files(folder, files)
            if len(missing) < len(files):
                print(f"{len(files) - len(missing)} of {len(files)} files are already in {folder.location}")
            _announce(missing, work, max((file.num_bytes or 0 for file in missing), default=0))
            for number, file in enumerate(missing, start=1):
                upload.pass_on(folder, file, work, f"[{number} of {len(missing)}] {file.name}", still_ours)
            fetched = (
                folder.path_of(files[0].name) if options.source == "imagenet-kaggle" else folder.location
            )
        shutil.rmtree(work, ignore_errors=True)
    with contextlib.suppress(OSError):
        work.parent.rmdir()  # where no other source is on its way
    return fetched


def _is_on_disk(path: Path, file: RemoteFile) -> bool:
    # Whatever has its final name was verified before it got it.
    return path.is_file() and file.num_bytes in (None, path.stat().st_size)


def _announce(missing: list[RemoteFile], place: Path, needed_bytes: int) -> None:
    sizes = [file.num_bytes for file in missing if file.num_bytes is not None]
    if not sizes:
        return  # nothing to do, or the transfer itself learns the size and says so
    print(f"{len(missing)} files, {readable_bytes(sum(sizes))} to download")
    require_room(place, needed_bytes)
