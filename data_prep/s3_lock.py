"""A lock that is an object: made by a conditional write, refreshed by a thread, stale when that stops.

Its holder may die in any way: on this machine that is seen at once, elsewhere after LOCK_STALE_SECONDS
without a sign of life. Two that find a stale lock both try to take it; the condition lets one through.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from data_prep.plain_json import parse_json
from data_prep.s3_requests import client, fetch, retry

LOCK_NAME = ".lock"
HEARTBEAT_SECONDS = 15.0
HEARTBEAT_ATTEMPTS = 4  # the next one comes soon
LOCK_STALE_SECONDS = 90.0  # six heartbeats missed: that writer is dead


class LockObject:
    """The lock of the writer of `location`, an object `key` of `bucket`."""

    def __init__(self, location: str, bucket: str, key: str) -> None:
        self._location = location
        self._where: dict[str, Any] = {"Bucket": bucket, "Key": key}
        self._owner = {"id": uuid.uuid4().hex, **_this_process()}
        self._etag = ""
        self._lost = False
        self._heard = _now()
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="s3-lock", daemon=True)

    def acquire(self) -> None:
        """Take it. RuntimeError: somebody alive has it."""
        for _ in range(3):
            if self._put(IfNoneMatch="*"):
                break
            holder, etag, age = self._holder()
            if not etag:
                continue  # released at this moment
            if not (age > LOCK_STALE_SECONDS or _is_dead(holder)):
                raise RuntimeError(
                    f"another process ({holder.get('host', '?')}, pid {holder.get('pid', '?')}, last sign of "
                    f"life {age:.0f} s ago) is writing to {self._location}: wait for it to end, or choose "
                    f"another prefix; a dead one's lock ends after {LOCK_STALE_SECONDS:.0f} s"
                )
            if self._put(IfMatch=etag):
                break
        else:
            raise RuntimeError(f"other processes begin to write to {self._location} at this very moment")
        self._thread.start()

    def check(self) -> None:
        """RuntimeError: another process has it now."""
        if not self._lost and _now() - self._heard > LOCK_STALE_SECONDS:
            self._beat(None)  # this machine slept, or S3 was silent: somebody may have taken it for dead
        if self._lost:
            raise RuntimeError(
                f"another process took {self._location} over while this one could not be heard: this one "
                "stops, and the other goes on"
            )

    def release(self) -> None:
        """Remove it, if it is still ours."""
        self._stop.set()
        self._thread.join()
        # What cannot be removed is stale soon, and seen to be dead from this machine.
        with contextlib.suppress(RuntimeError, FileNotFoundError):
            if self._is_ours(HEARTBEAT_ATTEMPTS):
                retry("unlocking", lambda: client().delete_object(**self._where), HEARTBEAT_ATTEMPTS)

    def _refresh(self) -> None:
        while not self._lost and not self._stop.wait(HEARTBEAT_SECONDS):
            # An S3 that does not answer is no reason to stop: the writer itself will see it.
            with contextlib.suppress(RuntimeError, FileNotFoundError):
                self._beat(HEARTBEAT_ATTEMPTS)

    def _beat(self, attempts: int | None) -> None:
        with self._mutex:
            self._lost = self._lost or not self._put(attempts, IfMatch=self._etag)

    def _put(self, attempts: int | None = None, **condition: str) -> bool:
        asked = _now()
        self._owner["beat"] = time.time_ns()  # another content has another ETag
        body = json.dumps(self._owner).encode()
        try:
            answer = retry(
                f"locking {self._location}",
                lambda: client().put_object(**self._where, Body=body, **condition),
                attempts,
            )
        except FileNotFoundError:
            return False  # If-Match on a lock that its holder has just released
        except ClientError:
            return self._is_ours(attempts)  # refused: a repeated request may have met its own first attempt
        self._etag, self._heard = answer["ETag"], asked
        return True

    def _is_ours(self, attempts: int | None) -> bool:
        holder, etag, age = self._holder(attempts)
        if holder.get("id") != self._owner["id"]:
            return False
        self._etag, self._heard = etag, _now() - age
        return True

    def _holder(self, attempts: int | None = None) -> tuple[dict[str, Any], str, float]:
        """(who, ETag, seconds since the last sign of life); the ETag is "" where there is no lock."""
        try:
            content, answer = retry(
                f"reading the lock of {self._location}", lambda: fetch(**self._where), attempts
            )
        except FileNotFoundError:
            return {}, "", 0.0
        # Both times are the server's: this machine's clock may be wrong.
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(date).timestamp() if date else time.time()
        try:
            holder = parse_json(content)
        except ValueError:
            holder = {}
        return holder if isinstance(holder, dict) else {}, answer["ETag"], now - _time_of(answer)


def _time_of(answer: dict[str, Any]) -> float:
    return float(answer["LastModified"].timestamp())


def _now() -> float:
    """Seconds of a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _this_process() -> dict[str, Any]:
    boot, names = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        # A container's processes have numbers of their own.
        "namespace": str(names.readlink()) if names.is_symlink() else "",
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
    }


def _start_time(pid: int) -> str:
    """When a process began; "" where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]  # a killed one whose parent has not asked for it yet


def _is_dead(holder: dict[str, Any]) -> bool:
    """A process of this very boot of this machine that is no more."""
    here = _this_process()
    if not holder.get("boot") or any(holder.get(key) != here[key] for key in ("host", "boot", "namespace")):
        return False
    return _start_time(int(holder["pid"])) != holder.get("started")
