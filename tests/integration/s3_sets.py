"""Data sets for the S3 tests, and the commands that make them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.launch import command, environment
from tests.integration.s3_server import SECRET, FaultyS3
from tests.unit.data_prep.test_tar_shards import write_noise_folder

FORMATS = ("ffcv", "dali")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    errors: str

    def assert_sentence(self, text: str) -> None:
        """It ended with one sentence, which says `text`, and without secrets."""
        assert self.code == 1, self
        sentences = [line for line in self.errors.splitlines() if "error: " in line]
        assert len(sentences) == 1 and text in sentences[0], self.errors
        assert "Traceback" not in self.errors and SECRET not in self.out + self.errors


def data_prep(
    *words: object, server: FaultyS3 | None = None, code: str = "", timeout: float = 60, **variables: str
) -> Outcome:
    """Run a command (or `code` in its place) to its end; a "kill" of `server` is for it."""
    call = [sys.executable, "-c", code] if code else command("data_prep")
    process = subprocess.Popen(
        [*call, *map(str, words)],
        cwd=ROOT,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if server is not None:
        server.victim = process.pid
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Outcome(process.returncode, out, errors)


def prepare_words(sets: NoiseSets, format: str, out: object) -> list[object]:
    """`prepare` as the local reference was made: some 16 MB, in parts of 8 MiB or tars of about 5 MB."""
    return [
        "prepare",
        "--source",
        sets.source,
        "--out",
        out,
        "--format",
        format,
        "--shard-mb",
        5,
        "--workers",
        1,
    ]


def local_files(folder: Path) -> dict[str, bytes]:
    """Name → content of all that a command left, the kernel's lock apart."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@dataclass(frozen=True)
class NoiseSets:
    """Images that do not compress, and what `prepare` makes of them on a disk; not to be written to."""

    source: Path
    root: Path

    def folder(self, format: str) -> Path:
        return self.root / format

    def files(self, format: str) -> dict[str, bytes]:
        return local_files(self.folder(format))


@pytest.fixture(scope="session")
def noise_sets(tmp_path_factory: pytest.TempPathFactory) -> NoiseSets:
    root = tmp_path_factory.mktemp("noise")
    sets = NoiseSets(write_noise_folder(root / "source", num_train=24, num_val=2, side=496), root)
    (sets.source / "train" / "class_1" / "zz_bad.jpg").write_bytes(b"junk")
    for format in FORMATS:
        assert data_prep(*prepare_words(sets, format, sets.folder(format))).code == 0
    return sets
