"""One file over HTTP: it continues where it broke off, and gets its name when it is whole and verified.

Beside `name` a download keeps `.name.partial` and `.name.partial.json`, which says which version of the file
the bytes belong to (ETag, date, size). When the server's version is another one, or its answer ignores the
Range, the file begins again from zero.

Example:
    >>> fetch(lambda: Link("https://example.org/a.tgz", {"md5": "…"}), Path("data/a.tgz"))
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import random
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from data_prep.download.room import byte_bar, readable_bytes, require_room
from data_prep.plain_json import read_json
from data_prep.storage import READ_BYTES, sync_folder, write_atomically

MAX_FRUITLESS = 6  # attempts in a row that bring no byte
MAX_RESTARTS = 3  # from zero, because the file changed under way
MAX_WAIT_SECONDS = 30.0
TIMEOUT_SECONDS = 30.0  # without a byte
REPEATABLE = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Link:
    """Where a file is at this moment (signed addresses expire), and what is published to compare it with."""

    url: str
    checksums: Mapping[str, str] = field(default_factory=dict)  # "md5", "crc32c": hexadecimal
    mismatch_advice: str = "run the same command again"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a source: `fetch(path, label)` leaves it there whole and verified, and can be repeated."""

    name: str
    num_bytes: int | None  # None: known only once it is asked for
    sha256: str | None
    fetch: Callable[[Path, str], None]


class Interrupted(Exception):
    """The connection broke off, or the server is busy: worth another attempt."""


@dataclass(frozen=True)
class _Version:
    etag: str | None
    modified: str | None
    num_bytes: int | None

    def is_known(self) -> bool:
        return bool(self.etag or self.modified)


def fetch(
    find_link: Callable[[], Link], target: Path, room_factor: float = 1.0, label: str | None = None
) -> None:
    """Download to `target`, from where an earlier attempt broke off.

    Args:
        find_link: asked before each attempt; may raise Interrupted.
        room_factor: disk needed in the end over the size of the file (more than 1 where it will be unpacked).

    Raises:
        RuntimeError: refused, not found, disk too small, wrong checksum, or no progress in several attempts.
    """
    label = label or target.name
    partial = partial_of(target)
    restarts = fruitless = 0
    while True:
        before = _size(partial)
        try:
            link = find_link()
            if _receive(link, partial, room_factor, label):
                break
            restarts += 1
            if restarts > MAX_RESTARTS:
                raise RuntimeError(f"{label} keeps changing on {_host(link.url)}: try again later")
        except Interrupted as error:
            fruitless = 0 if _size(partial) > before else fruitless + 1
            if fruitless >= MAX_FRUITLESS:
                raise RuntimeError(
                    f"{label} cannot be reached ({error}): check the network and run the same command again; "
                    f"{readable_bytes(_size(partial))} are kept, and it goes on from there"
                ) from None
            wait = random.uniform(0.5, 1.0) * min(MAX_WAIT_SECONDS, 2.0**fruitless)
            print(f"{label}: {error}; going on in {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)
    _verify(partial, link, label)
    publish(partial, target)
    _state_of(partial).unlink(missing_ok=True)


def partial_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def publish(partial: Path, target: Path) -> None:
    """Give a whole file its name, durably."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)
    sync_folder(target.parent)


def discard(target: Path) -> None:
    """Remove a file and what an unfinished download left of it."""
    for path in (target, partial_of(target), _state_of(partial_of(target))):
        path.unlink(missing_ok=True)


def _receive(link: Link, partial: Path, room_factor: float, label: str) -> bool:
    """Append what is missing to `partial`. False: it is another file by now; what was there is removed."""
    version, offset = _read_state(partial), _size(partial)
    if version is None or not version.is_known():
        offset = 0
    try:
        response = _open(link.url, offset, label)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing lies beyond the offset: we have it all, or it has become shorter.
        if version is not None and version.num_bytes == offset and _total(error.headers) in (None, offset):
            return True
        _start_again(partial, label, "it has become shorter")
        return False
    with response:
        now = _version_of(response)
        if response.status == 206:
            if now != version or _first_byte(response) != offset:
                _start_again(partial, label, "it has changed on the server")
                return False
        else:
            if offset:
                why = "the server does not resume" if now == version else "it has changed on the server"
                _start_again(partial, label, why)
            offset = 0
            partial.unlink(missing_ok=True)  # before its state, which must never describe other bytes
            write_atomically(_state_of(partial), json.dumps(asdict(now)).encode())
        if now.num_bytes is not None:
            kept = f" ({readable_bytes(offset)} are here already)" if offset else ""
            print(f"{label}: {readable_bytes(now.num_bytes - offset)} to download{kept}")
            require_room(partial.parent, now.num_bytes * room_factor - offset)
        _append(response, partial, offset, now.num_bytes, label)
    if now.num_bytes is not None and _size(partial) != now.num_bytes:
        raise Interrupted(f"the connection broke off after {readable_bytes(_size(partial))}")
    return True


def _open(url: str, offset: int, label: str) -> http.client.HTTPResponse:
    headers = {"User-Agent": "imagenet-sprint", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code in REPEATABLE:
            raise Interrupted(f"{_host(url)} answered {error.code}") from None
        if error.code == 416 and offset:
            raise
        raise RuntimeError(
            f"{label}: {_host(url)} answered {error.code} {error.reason} for {_without_secrets(url)}: check "
            "the address"
        ) from None
    except urllib.error.URLError as error:
        raise Interrupted(f"{_host(url)}: {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"{_host(url)}: {error or type(error).__name__}") from None
    except ValueError:
        raise ValueError(f"{_without_secrets(url)} is no address: write https://host/path") from None


def _append(
    response: http.client.HTTPResponse, partial: Path, offset: int, total: int | None, label: str
) -> None:
    started, num_new = time.monotonic(), 0
    with partial.open("ab") as file, byte_bar(total, label, offset) as bar:
        while True:
            try:
                # read1 gives what has come: a kill loses no more than that, and the bar moves.
                block = response.read1(READ_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise Interrupted(f"the connection broke off ({type(error).__name__})") from None
            if not block:
                break
            _write(file, block)
            num_new += len(block)
            bar.update(len(block))
    seconds = max(time.monotonic() - started, 1e-3)
    if num_new:
        print(f"{label}: {readable_bytes(num_new)} in {seconds:.0f} s ({num_new / seconds / 1e6:.1f} MB/s)")


def _write(file: Any, block: bytes) -> None:
    try:
        file.write(block)
        file.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(
            "the disk is full: free some space and run the same command again (it goes on from there)"
        ) from None


def _verify(partial: Path, link: Link, label: str) -> None:
    if not link.checksums:
        print(f"{label}: no checksum is published for it, so only its size was compared")
        return
    name, published = next(iter(link.checksums.items()))
    digest = google_crc32c.Checksum() if name == "crc32c" else hashlib.new(name)
    with partial.open("rb") as file, byte_bar(_size(partial), f"{label}: {name}") as bar:
        while block := file.read(READ_BYTES):
            digest.update(block)
            bar.update(len(block))
    found = digest.digest().hex()
    if found != published.lower():
        partial.unlink()
        _state_of(partial).unlink(missing_ok=True)
        raise RuntimeError(
            f"{label} has {name} {found} and not the expected {published}: what was downloaded is deleted; "
            f"{link.mismatch_advice}"
        )
    print(f"{label}: {name} {found} as expected")


def _start_again(partial: Path, label: str, why: str) -> None:
    print(f"{label} begins again from zero: {why}", file=sys.stderr)
    partial.unlink(missing_ok=True)
    _state_of(partial).unlink(missing_ok=True)


def _version_of(response: http.client.HTTPResponse) -> _Version:
    length = response.headers.get("Content-Length")
    total = _total(response.headers) if response.status == 206 else int(length) if length else None
    return _Version(response.headers.get("ETag"), response.headers.get("Last-Modified"), total)


def _total(headers: Any) -> int | None:
    """Of `Content-Range: bytes 5-9/10` or `bytes */10`, the 10."""
    total = (headers.get("Content-Range") or "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _first_byte(response: http.client.HTTPResponse) -> int | None:
    first = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else None


def _state_of(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_state(partial: Path) -> _Version | None:
    try:
        return _Version(**read_json(_state_of(partial)))
    except (OSError, ValueError, TypeError):
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or url


def _without_secrets(url: str) -> str:
    """A signed address carries its signature in the query, a private mirror's perhaps a password."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))
