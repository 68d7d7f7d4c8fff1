"""Small sets from a mirror on this machine: interrupted, damaged and refused downloads."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import download
from data_prep.download import archives, transfer
from data_prep.sources import open_source
from tests.conftest import ROOT, class_image
from tests.integration.download_server import DownloadServer, Served

PATH = "/imagenette2-320.tgz"


@pytest.fixture
def server() -> Iterator[DownloadServer]:
    server = DownloadServer()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_WAIT_SECONDS", 0.02)


@pytest.fixture(scope="module")
def packed() -> bytes:
    """An archive like fast.ai's, some hundred kB: two classes in two splits, and bytes that do not shrink."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for split, count in (("train", 3), ("val", 1)):
            for label, wnid in enumerate(("n01440764", "n02102040")):
                for seed in range(count):
                    image = io.BytesIO()
                    class_image(label, seed, 200, 160).save(image, "JPEG", quality=95)
                    name = f"imagenette2-320/{split}/{wnid}/{wnid}_{seed}.JPEG"
                    _add(archive, name, image.getvalue())
        _add(archive, "imagenette2-320/noisy_imagenette.csv", random.Random(0).randbytes(300_000))
    return content.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    download.add_arguments(parser)
    return download.run(parser.parse_args([str(argument) for argument in arguments]))


def mirror(server: DownloadServer, content: bytes, md5: str | None = None) -> list[str]:
    server.files.setdefault(PATH, Served(content))
    md5 = md5 or hashlib.md5(content).hexdigest()
    return ["imagenette", "--url", f"{server.url}{PATH}", "--md5", md5]


def fetch(server: DownloadServer, target: Path) -> None:
    md5 = hashlib.md5(server.files[PATH].content).hexdigest()
    transfer.fetch(lambda: transfer.Link(f"{server.url}{PATH}?key=secret", {"md5": md5}), target)


def hidden_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_an_archive_becomes_a_source(
    server: DownloadServer, packed: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*mirror(server, packed), "--out", tmp_path]
    assert run(*arguments) == 0
    folder = tmp_path / "imagenette2-320"
    source = open_source(folder)
    assert (source.count("train"), source.count("val")) == (6, 2)
    out = capsys.readouterr().out
    assert f"next: python -m data_prep prepare --source {folder} --out {folder}-prepared" in out
    assert "MB/s" in out and "md5" in out and "of disk" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "imagenette2-320"]
    assert run(*arguments) == 0
    assert len(server.asked) == 1, "what is there is not fetched again"


@pytest.mark.parametrize(
    "faults", [["503", "503"], ["drop:100000"], ["drop:1", "503", "drop:150000", "503"], ["drop:0"]]
)
def test_faults_on_the_way_do_not_show(
    server: DownloadServer, packed: bytes, tmp_path: Path, faults: list[str]
) -> None:
    server.files[PATH] = Served(packed)
    server.faults = [*faults]
    fetch(server, tmp_path / "a.tgz")
    assert (tmp_path / "a.tgz").read_bytes() == packed
    assert len(server.asked) == len(faults) + 1
    came = sum(int(fault.removeprefix("drop:")) for fault in faults if fault.startswith("drop:"))
    assert server.gets(PATH)[-1] == (f"bytes={came}-" if came else None)
    assert hidden_files(tmp_path) == []


def driver(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    # A job in the background ignores Ctrl-C, and hands that on: here it must not.
    code = (
        "import argparse, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from data_prep import download; p = argparse.ArgumentParser();"
        "download.add_arguments(p); sys.exit(download.run(p.parse_args()))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_continues(
    server: DownloadServer, packed: bytes, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = [*mirror(server, packed), "--out", str(tmp_path)]
    server.bytes_per_second = 300_000
    partial = tmp_path / ".imagenette2-320.tgz.partial"
    process = driver(arguments)
    wanted = random.uniform(0.1, 0.7) * len(packed)
    while not (partial.exists() and partial.stat().st_size >= wanted):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    errors = process.communicate()[1]
    if number == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on" in errors
        assert "Traceback" not in errors
    kept = partial.stat().st_size
    assert wanted <= kept < len(packed)
    server.bytes_per_second = None
    assert run(*arguments) == 0
    assert server.gets(PATH) == [None, f"bytes={kept}-"]
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None and (tmp_path / member.name).read_bytes() == stream.read()


def interrupt(server: DownloadServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave 1,000 bytes of the file, as a killed run does."""
    server.faults = ["drop:1000"] + ["503"] * 2
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"1\.0 kB are kept"):
        patch.setattr(transfer, "MAX_FRUITLESS", 2)
        fetch(server, target)
    assert transfer.partial_of(target).stat().st_size == 1000
    server.asked.clear()


@pytest.mark.parametrize("change", ["etag", "size", "no range"])
def test_another_version_begins_from_zero(
    server: DownloadServer, packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    server.files[PATH] = Served(packed)
    interrupt(server, tmp_path / "a.tgz", monkeypatch)
    server.files[PATH] = {
        "etag": Served(packed[::-1], etag='"two"'),
        "size": Served(packed[:500]),
        "no range": Served(packed, ranges=False),
    }[change]
    fetch(server, tmp_path / "a.tgz")
    assert (tmp_path / "a.tgz").read_bytes() == server.files[PATH].content
    assert server.gets(PATH)[0] == "bytes=1000-"


def test_a_whole_partial_only_needs_its_name(
    server: DownloadServer, packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files[PATH] = Served(packed)
    interrupt(server, tmp_path / "a.tgz", monkeypatch)
    transfer.partial_of(tmp_path / "a.tgz").write_bytes(packed)
    server.sent_bytes = 0
    fetch(server, tmp_path / "a.tgz")
    assert (tmp_path / "a.tgz").read_bytes() == packed and server.sent_bytes == 0


def test_a_wrong_checksum_deletes_what_came(server: DownloadServer, packed: bytes, tmp_path: Path) -> None:
    server.faults = ["flip"]
    arguments = [*mirror(server, packed), "--out", tmp_path]
    with pytest.raises(RuntimeError, match=r"not the expected .* what was downloaded is deleted"):
        run(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
    assert run(*arguments) == 0


def test_refusals_are_sentences_without_secrets(server: DownloadServer, tmp_path: Path) -> None:
    for status in (401, 403, 404):
        server.endpoints[PATH] = lambda asked, status=status: (status, {}, b"")
        server.files[PATH] = Served(b"")
        with pytest.raises(RuntimeError, match=f"answered {status}") as caught:
            fetch(server, tmp_path / "a.tgz")
        assert "secret" not in str(caught.value)
    with pytest.raises(RuntimeError, match=r"cannot be reached.*check the network"):
        transfer.fetch(lambda: transfer.Link("http://127.0.0.1:9/a.tgz"), tmp_path / "a.tgz")
    with pytest.raises(ValueError, match="no address"):
        transfer.fetch(lambda: transfer.Link("elsewhere/a.tgz"), tmp_path / "a.tgz")


@pytest.mark.parametrize("trick", ["path", "link", "absolute"])
def test_an_archive_cannot_write_outside(server: DownloadServer, tmp_path: Path, trick: str) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        _add(archive, "imagenette2-320/train/a.txt", b"fine")
        if trick == "link":
            info = tarfile.TarInfo("imagenette2-320/out")
            info.type, info.linkname = tarfile.SYMTYPE, "../../.."
            archive.addfile(info)
            _add(archive, "imagenette2-320/out/outside.txt", b"bad")
        else:
            name = "../../outside.txt" if trick == "path" else f"{tmp_path}/outside.txt"
            _add(archive, name, b"bad")
    out = tmp_path / "data"
    # Absolute names are taken as names below the folder.
    refused = pytest.raises(RuntimeError, match="outside its folder")
    with refused if trick != "absolute" else contextlib.nullcontext():
        run(*mirror(server, content.getvalue()), "--out", out)
    assert not [path for path in tmp_path.rglob("outside.txt") if not path.is_relative_to(out)]
    assert hidden_files(out) == []


def test_an_archive_cannot_fill_the_disk(server: DownloadServer, tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as archive:
        for number in range(9):
            _add(archive, f"imagenette2-320/train/{number}.jpg", bytes(8 << 20))
    out = tmp_path / "data"
    with pytest.raises(RuntimeError, match="many times its size"):
        run(*mirror(server, content.getvalue()), "--out", out)
    assert hidden_files(out) == [] and not (out / "imagenette2-320").exists()


def test_a_damaged_archive_is_deleted(server: DownloadServer, packed: bytes, tmp_path: Path) -> None:
    arguments = [*mirror(server, packed[:-50_000], md5="none"), "--out", tmp_path]
    with pytest.raises(RuntimeError, match=r"no whole tar archive.*deleted"):
        run(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
    server.files[PATH] = Served(packed, etag='"two"')
    assert run(*arguments) == 0


def test_too_little_disk_is_said_before(
    server: DownloadServer, packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(1 << 30, 1 << 30, len(packed))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match=r"free and .* are needed: free some space"):
        run(*mirror(server, packed), "--out", tmp_path)
    assert not (tmp_path / ".imagenette2-320.tgz.partial").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["cifar10", "--size", "320", "--out", "x"],
        ["imagenet-hf", "--url", "http://x", "--out", "x"],
        ["imagenette", "--with-test", "--out", "x"],
        ["imagenette", "--scratch", "y", "--out", "x"],
        ["imagenette", "--md5", "abc", "--out", "x"],
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--"):
        run(*arguments)


def test_addresses_and_checksums_are_torchvisions() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    assert archives.ARCHIVES["cifar10", ""] == (datasets.CIFAR10.url, datasets.CIFAR10.tgz_md5)
    for size in archives.SIZES:
        theirs = datasets.Imagenette._ARCHIVES[size if size == "full" else f"{size}px"]
        assert archives.ARCHIVES["imagenette", size] == theirs
