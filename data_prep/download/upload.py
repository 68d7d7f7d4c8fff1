"""What was downloaded, on to S3: in parallel pieces, verified by reading back, then deleted here.

`.download.json` in the target remembers what was verified (size, SHA-256, ETag), so that running again asks
S3 for a listing only. Nothing that is not whole has its name there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_prep.download.room import byte_bar
from data_prep.download.transfer import RemoteFile
from data_prep.plain_json import parse_json
from data_prep.storage import Folder, sha256_of

INVENTORY = ".download.json"
PIECE_BYTES = 32 << 20
MAX_PIECES = 9_000  # S3 takes 10,000
THREADS = 4  # pieces in flight
SMALL_FILE_THREADS = 16


def missing_files(folder: Folder, files: list[RemoteFile]) -> list[RemoteFile]:
    """Those that are not in `folder` with their size and, where it is published, their checksum."""
    there = {info.name: info for info in folder.files()}
    inventory = _read_inventory(folder)
    missing = []
    for file in files:
        info, entry = there.get(file.name), inventory.get(file.name)
        if info is None or file.num_bytes not in (None, info.num_bytes):
            missing.append(file)
        elif entry and entry["version"] == info.version and file.sha256 in (None, entry["sha256"]):
            continue
        elif file.sha256 is None:
            # Uploaded by somebody else: its size is all that there is to compare.
            if file.num_bytes is None:
                missing.append(file)
        elif sha256_of(folder, file.name, info.num_bytes) == file.sha256:
            _remember(folder, file.name, info.num_bytes, file.sha256, info.version)
        else:
            missing.append(file)
    return missing


def pass_on(folder: Folder, file: RemoteFile, work: Path, label: str, still_ours: Callable[[], None]) -> None:
    """Download one file to `work`, upload it, verify it, and delete it here."""
    path = work / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    # A whole one is what an interrupted upload left.
    if not path.is_file():
        file.fetch(path, label)
    still_ours()
    sha256 = upload_file(folder, file.name, path, label)
    info = folder.info(file.name)
    if info is not None:
        _remember(folder, file.name, info.num_bytes, sha256, info.version)
    path.unlink()
    print(f"{label}: uploaded and verified")


def upload_file(folder: Folder, name: str, path: Path, label: str) -> str:
    """Upload a file in pieces and compare what can be read back; its SHA-256.

    Raises:
        RuntimeError: S3 gives back other bytes, or cannot be reached.
    """
    num_bytes = path.stat().st_size
    # What a killed run began is invisible and costs storage.
    folder.abort_unfinished(name)
    piece_bytes = max(PIECE_BYTES, -(-num_bytes // MAX_PIECES))
    with byte_bar(num_bytes, f"{label}: upload") as bar:
        sha256 = _upload_pieces(folder, name, path, piece_bytes, bar.update)
    with byte_bar(num_bytes, f"{label}: verify") as bar:
        there = sha256_of(folder, name, num_bytes, bar.update)
    if there != sha256:
        folder.delete(name)
        raise RuntimeError(
            f"{folder.path_of(name)} reads back differently from what was uploaded: it is deleted there; run "
            "the same command again"
        )
    return sha256


def tree_is_there(folder: Folder, below: str) -> bool:
    """Whether a folder was uploaded whole, and still has as many files and bytes."""
    entry = _read_inventory(folder).get(f"{below}/")
    if entry is None:
        return False
    files = folder.files(below)
    return [len(files), sum(file.num_bytes for file in files)] == [entry["num_files"], entry["num_bytes"]]


def upload_tree(folder: Folder, root: Path, below: str, still_ours: Callable[[], None]) -> None:
    """Upload the many small files of `root` to `below`, each read back; what an earlier run left is kept.

    Raises:
        RuntimeError: as for `upload_file`.
    """
    there = {info.name: info.num_bytes for info in folder.files(below)}
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    sizes = {path: path.stat().st_size for path in paths}

    def send(path: Path) -> int:
        name = f"{below}/{path.relative_to(root).as_posix()}"
        if sizes[path] > PIECE_BYTES:
            if there.get(name) != sizes[path]:
                upload_file(folder, name, path, path.name)
            return sizes[path]
        content = path.read_bytes()
        if there.get(name) != len(content):
            folder.write(name, content)
        if folder.read(name) != content:
            folder.delete(name)
            raise RuntimeError(
                f"{folder.path_of(name)} reads back differently from what was uploaded: it is deleted there; "
                "run the same command again"
            )
        return sizes[path]

    with (
        ThreadPoolExecutor(SMALL_FILE_THREADS) as pool,
        byte_bar(sum(sizes.values()), f"{below}: upload and verify") as bar,
    ):
        futures = [pool.submit(send, path) for path in paths]
        try:
            for future in futures:
                bar.update(future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    still_ours()
    _write_inventory(folder, f"{below}/", {"num_files": len(paths), "num_bytes": sum(sizes.values())})
    shutil.rmtree(root)
    print(f"{folder.path_of(below)}: {len(paths):,} files uploaded and verified")


def _upload_pieces(
    folder: Folder, name: str, path: Path, piece_bytes: int, advance: Callable[[int], object]
) -> str:
    digest, pending = hashlib.sha256(), deque[tuple[Future[None], int]]()
    upload = folder.create(name, piece_bytes)

    def settle() -> None:
        future, length = pending.popleft()
        future.result()
        advance(length)

    num_pieces = 0
    try:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="upload") as pool, path.open("rb") as file:
            # An empty file is one empty piece.
            while (content := file.read(piece_bytes)) or not num_pieces:
                digest.update(content)
                pending.append((pool.submit(upload.put, num_pieces, content), len(content)))
                num_pieces += 1
                if len(pending) > THREADS:
                    settle()
            while pending:
                settle()
        upload.finish(num_pieces, path.stat().st_size)
    except BaseException:
        with contextlib.suppress(RuntimeError, FileNotFoundError):
            upload.abort()
        raise
    return digest.hexdigest()


def _read_inventory(folder: Folder) -> dict[str, Any]:
    try:
        return dict(parse_json(folder.read(INVENTORY)))
    except (FileNotFoundError, ValueError):
        return {}


def _write_inventory(folder: Folder, name: str, entry: dict[str, Any]) -> None:
    inventory = {**_read_inventory(folder), name: entry}
    folder.write(INVENTORY, json.dumps(inventory, indent=1, sort_keys=True).encode())


def _remember(folder: Folder, name: str, num_bytes: int, sha256: str, version: str) -> None:
    _write_inventory(folder, name, {"num_bytes": num_bytes, "sha256": sha256, "version": version})
