"""The small sets that come as one archive: Imagenette, Imagewoof and CIFAR-10; fetched, verified, unpacked.

Example:
    >>> fetch_and_unpack(choose("imagenette", "320"), Path("data"))
    PosixPath('data/imagenette2-320')
"""

from __future__ import annotations

import gzip
import os
import shutil
import string
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.download.transfer import Link, discard, fetch
from data_prep.storage import sync_folder

FAST_AI = "https://s3.amazonaws.com/fast-ai-imageclas"
SIZED = ("imagenette", "imagewoof")
NAMES = (*SIZED, "cifar10")
SIZES = ("full", "320", "160")
DEFAULT_SIZE = "320"
ROOM_FACTOR = 2.3  # the archive, and what is in it, with the ends of the last blocks of many small files

MAX_GROWTH = 10  # of an archive of images
GROWTH_SLACK_BYTES = 64 << 20  # for members that are mostly header

MISMATCH_ADVICE = "run the same command again, with --md5 if the publisher has replaced the archive"

# Addresses and MD5s of CIFAR-10 and Imagenette are torchvision's. fast.ai publishes none of whole archives;
# Imagewoof's are those that other projects (Catalyst is one) list together with torchvision's for Imagenette.
ARCHIVES = {
    ("imagenette", "full"): (f"{FAST_AI}/imagenette2.tgz", "fe2fc210e6bb7c5664d602c3cd71e612"),
    ("imagenette", "320"): (f"{FAST_AI}/imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
    ("imagenette", "160"): (f"{FAST_AI}/imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    ("imagewoof", "full"): (f"{FAST_AI}/imagewoof2.tgz", "9aafe18bcdb1632c4249a76c458465ba"),
    ("imagewoof", "320"): (f"{FAST_AI}/imagewoof2-320.tgz", "0f46d997ec2264e97609196c95897a44"),
    ("imagewoof", "160"): (f"{FAST_AI}/imagewoof2-160.tgz", "3d200a7be99704a0d7509be2a9fbfe15"),
    ("cifar10", ""): (
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
    ),
}


@dataclass(frozen=True)
class Archive:
    url: str
    md5: str | None
    folder: str  # what it unpacks to

    @property
    def name(self) -> str:
        return f"{self.folder}.tgz"


def choose(source: str, size: str | None = None, url: str | None = None, md5: str | None = None) -> Archive:
    """The archive of a source, from a mirror and with another checksum ("none" for none) where given.

    Raises:
        ValueError: `md5` is no MD5.
    """
    size = (size or DEFAULT_SIZE) if source in SIZED else ""
    own_url, own_md5 = ARCHIVES[source, size]
    if md5 and md5 != "none" and not (len(md5) == 32 and set(md5) <= set(string.hexdigits)):
        raise ValueError(f"--md5 is {md5}: write its 32 hexadecimal digits, or none")
    folder = "cifar-10-batches-py" if source == "cifar10" else own_url.rpartition("/")[2].removesuffix(".tgz")
    return Archive(url or own_url, None if md5 == "none" else md5 or own_md5, folder)


def fetch_and_unpack(archive: Archive, out: Path) -> Path:
    """Leave the archive's folder in `out` and return its path; the archive itself is not kept.

    Raises:
        RuntimeError: it cannot be fetched, is damaged, or wants to write outside its folder.
    """
    folder, packed = out / archive.folder, out / archive.name
    unpacking = out / f".{archive.folder}.unpacking"
    shutil.rmtree(unpacking, ignore_errors=True)
    if folder.is_dir():
        # It got its name when it was whole; a kill may have left the archive.
        discard(packed)
        print(f"{folder} is already there")
        return folder
    if not packed.is_file():
        link = Link(archive.url, {"md5": archive.md5} if archive.md5 else {}, MISMATCH_ADVICE)
        fetch(lambda: link, packed, room_factor=ROOM_FACTOR)
    print(f"unpacking {packed.name}")
    _unpack(packed, unpacking)
    entries = list(unpacking.iterdir())
    inside = entries[0] if len(entries) == 1 and entries[0].is_dir() else unpacking
    os.sync()  # one for all: a name must not outlive a power cut that its files do not
    inside.replace(folder)
    sync_folder(out)
    shutil.rmtree(unpacking, ignore_errors=True)
    discard(packed)
    return folder


def _bounded(archive: tarfile.TarFile, packed_bytes: int) -> Iterator[tarfile.TarInfo]:
    """Members one by one, until they are more than images can be: they hardly compress."""
    total = 0
    for member in archive:
        total += tarfile.BLOCKSIZE + member.size
        if total > MAX_GROWTH * packed_bytes + GROWTH_SLACK_BYTES:
            raise tarfile.ReadError(f"it unpacks to more than {total / 1e6:,.0f} MB, many times its size")
        yield member


def _unpack(packed: Path, into: Path) -> None:
    into.mkdir()
    try:
        with tarfile.open(packed) as archive:
            # "data" refuses paths and links to the outside, devices, and foreign owners and modes.
            archive.extractall(into, members=_bounded(archive, packed.stat().st_size), filter="data")
    except tarfile.FilterError as error:
        discard(packed)
        shutil.rmtree(into, ignore_errors=True)
        raise RuntimeError(
            f"{packed.name} wants to write outside its folder ({error}): nothing of it was kept; take it "
            "from another address"
        ) from None
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        discard(packed)
        shutil.rmtree(into, ignore_errors=True)
        raise RuntimeError(
            f"{packed.name} is no whole tar archive ({error or type(error).__name__}): it is deleted, run "
            "the same command again"
        ) from None
