"""A data set in S3 becomes a folder on this machine's disk, once, before training reads from it.

The whole data set is copied (in parallel ranges, every file verified; see data_prep/copying.py) into a folder
named after its location and version, and the next run finds it there. On each machine one rank stages, in a
process of its own, while all ranks meet every second: so no wait is long enough to run into the process
group's timeout, and a fault or a signal on one machine ends it on all.

    STAGE_FOLDER/
      imagenet-1f0c3a52-9d41c07be2aa/    s3://some-bucket/some/imagenet: last part of the prefix, hash of the
                                         location, first digits of the SHA-256 of its manifest.json
      imagenet-1f0c3a52-07ac55d19be3/    an older version of it; nothing here is ever deleted by us

Example:
    >>> folder = staged_folder("s3://my-bucket/imagenet", Path("/mnt/nvme"), ranks, lambda: stop.is_raised)
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from data_prep.copying import copy_data_set, read_manifest
from data_prep.manifest import MANIFEST_NAME, Manifest
from data_prep.storage import FolderInUse, LocalFolder, exclusive_lock, is_s3, open_folder
from data_prep.workers import begin_worker
from train.data.job_signals import kept_from_children

if TYPE_CHECKING:  # the copying process imports this module, and has no use for torch
    from train.distributed import Ranks

HEARTBEAT_SECONDS = 1.0  # between two meetings of the ranks; a stop is noticed within two of them
WAIT_SECONDS = 1.0  # between two looks at what another process is staging
VERSION_DIGITS = 12


@dataclass(frozen=True)
class StagedCopy:
    """A whole copy of one version of a data set on this machine."""

    folder: Path
    manifest_sha256: str


@dataclass(frozen=True)
class _Fault:
    sentence: str


_Outcome = StagedCopy | _Fault


def staged_folder(
    location: str | Path,
    stage_folder: Path,
    ranks: Ranks,
    wants_to_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> Path | None:
    """The local folder of the data set at `location`: itself where it is local, else its copy.

    Called by every rank, it returns, and fails, on all of them together. What is there already is kept.

    Args:
        location: a path, or `s3://bucket/prefix` (as text: a `Path` would lose a slash).
        stage_folder: where copies are kept, a folder each; on a disk of this machine.
        wants_to_stop: whether this rank was asked to stop; looked at once a second.
        say: takes lines for the user; called on the rank of each machine that stages (local rank 0).

    Returns:
        The folder, of the same version on all machines; None where a rank was asked to stop: nothing is lost,
        the next start goes on from there.

    Raises:
        ValueError: on every rank, the sentence of the machine that could not do it: no data set there, no
            room on the disk, S3 fails for good, …
    """
    text = str(location)
    if not is_s3(text):
        open_folder(text)  # refuses what is neither a path nor s3://
        return Path(text)
    stager = _Stager(text, stage_folder, ranks.is_primary, say) if ranks.local_rank == 0 else None
    outcome: _Outcome | None = None
    try:
        while True:
            if stager is None:
                time.sleep(HEARTBEAT_SECONDS)
            else:
                outcome = stager.wait(HEARTBEAT_SECONDS)
            is_waiting = stager is not None and outcome is None
            # Every rank gets the same sums, so all leave in the same round.
            num_waiting, num_failed, num_stopping = ranks.sum(
                [is_waiting, isinstance(outcome, _Fault), wants_to_stop()]
            )
            if num_stopping:
                if stager is not None:
                    say("staging was stopped by a signal: the next start goes on from here")
                return None
            if num_failed or not num_waiting:
                break
    finally:
        if stager is not None:
            stager.end()
    outcomes = ranks.gather((socket.gethostname(), outcome))
    _check_outcomes(text, outcomes)
    # torchrun numbers the ranks of a machine one after another.
    staged = outcomes[ranks.rank - ranks.local_rank][1]
    assert isinstance(staged, StagedCopy)
    return staged.folder


def _check_outcomes(location: str, outcomes: list[tuple[str, _Outcome | None]]) -> None:
    """Raise the machines' faults as one ValueError; also where they hold different versions."""
    hosts_of: dict[str, list[str]] = {}
    for host, outcome in outcomes:
        if isinstance(outcome, _Fault):
            hosts_of.setdefault(outcome.sentence, []).append(host)
    # With one machine, or one fault on all, nobody asks where.
    if len({host for host, _ in outcomes}) == 1:
        faults = list(hosts_of)
    else:
        faults = [f"{sentence} (on {', '.join(hosts)})" for sentence, hosts in hosts_of.items()]
    if faults:
        raise ValueError("; ".join(faults))
    if len({outcome.manifest_sha256 for _, outcome in outcomes if isinstance(outcome, StagedCopy)}) > 1:
        raise ValueError(
            f"the machines hold different versions of {location}: start again, so that all see the newest"
        )


class _Stager:
    """Stages in a process of its own.

    A thread could not be ended while it waits for S3, which may take minutes; a process can, at any moment,
    and its locks end with it.
    """

    def __init__(self, location: str, stage_folder: Path, progress: bool, say: Callable[[str], None]) -> None:
        self._say = say
        self._outcome: _Outcome | None = None
        # Spawned, not forked: torch's threads and the GPU do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_stage_and_report, args=(theirs, location, stage_folder, progress), daemon=True
        )
        try:
            with kept_from_children():  # not even while it is importing
                self._process.start()
        except OSError as error:  # raised here, it would leave the other ranks waiting
            self._outcome = _Fault(f"no process could be started to stage {location} ({error.strerror})")
        theirs.close()

    def wait(self, seconds: float) -> _Outcome | None:
        """Pass on what it says, for at most that long; its outcome once it has one."""
        until = time.monotonic() + seconds
        while self._outcome is None and self._ours.poll(max(0.0, until - time.monotonic())):
            try:
                news = self._ours.recv()
            except EOFError:
                self._process.join()
                self._outcome = _Fault(
                    f"the process that stages was ended (exit code {self._process.exitcode}), perhaps for "
                    "memory: start again, it goes on from there"
                )
                break
            if isinstance(news, str):
                self._say(news)
            else:
                self._outcome = news
        return self._outcome

    def end(self) -> None:
        """End it wherever it is: a copy goes on after a kill."""
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()
        self._ours.close()


def _stage_and_report(connection: Connection, location: str, stage_folder: Path, progress: bool) -> None:
    begin_worker()
    # Its own lock is a semaphore between processes, which Python reports as leaked after a kill.
    tqdm.set_lock(threading.RLock())
    outcome: _Outcome
    try:
        outcome = stage(location, stage_folder, progress, connection.send)
    except (ValueError, RuntimeError, OSError) as error:
        outcome = _Fault(str(error))
    except Exception as error:
        traceback.print_exc()  # none of the faults that we know: somebody will want to see where
        outcome = _Fault(f"{type(error).__name__}: {error}")
    connection.send(outcome)


def stage(
    location: str, stage_folder: Path, progress: bool = True, say: Callable[[str], None] = print
) -> StagedCopy:
    """Make a whole copy of a data set below `stage_folder`, or find it there; on this machine, blocking.

    A copy is taken for whole where its manifest is the source's, and all files have their sizes: every byte
    was compared when it was copied, and loaders check every sample again. Where the source cannot be asked,
    the only copy of it is used, if it is whole.

    Args:
        location: `s3://bucket/prefix` or a path.
        progress: draw a bar while copying.

    Raises:
        ValueError: no data set there, no room, or not to be written to; a damaged file of the source.
        RuntimeError: S3 fails for good and there is no copy to go on with; the disk became full.
    """
    source = open_folder(location)
    location = source.location  # with or without a slash at its end
    try:
        manifest, content = read_manifest(source)
    except RuntimeError as error:
        return _only_copy(location, stage_folder, error, say)
    version = hashlib.sha256(content).hexdigest()
    copy = StagedCopy(_copy_folder(location, stage_folder, version), version)
    is_waiting = False
    while not _is_whole(copy.folder, version):
        _check_disk(location, stage_folder, copy.folder, manifest)
        try:
            with exclusive_lock(_made(copy.folder)):
                pass  # copying takes it again, and says so first
            _copy_missing(location, copy, manifest, progress, say)
            break
        except FolderInUse:
            if not is_waiting:
                say(f"another process is staging {location} to {copy.folder}: waiting for it")
            is_waiting = True
            time.sleep(WAIT_SECONDS)
    else:
        say(
            f"staged copy {copy.folder} of {location} is reused, all sizes agree (python -m data_prep copy, "
            "with both places, checks and mends every byte)"
        )
    _name_older_copies(location, stage_folder, copy.folder, say)
    return copy


def check_staging(location: str, stage_folder: Path) -> Manifest:
    """Everything that `stage` needs, without copying: the data set's manifest, and room on the disk.

    Raises:
        ValueError, RuntimeError: as `stage`.
    """
    source = open_folder(location)
    manifest, content = read_manifest(source)
    version = hashlib.sha256(content).hexdigest()
    folder = _copy_folder(source.location, stage_folder, version)
    if not _is_whole(folder, version):
        _check_disk(source.location, stage_folder, folder, manifest)
    return manifest


def _copy_missing(
    location: str, copy: StagedCopy, manifest: Manifest, progress: bool, say: Callable[[str], None]
) -> None:
    present = LocalFolder(copy.folder).info(MANIFEST_NAME)
    if present is not None and _version_of(copy.folder) != copy.manifest_sha256:
        raise ValueError(
            f"{copy.folder / MANIFEST_NAME} is not what was staged there: delete that folder, and start again"
        )
    say(
        f"staging {location} to {copy.folder}: "
        f"{_size(_missing_bytes(copy.folder, manifest))} of {_size(_total_bytes(manifest))} are to be copied"
    )
    result = copy_data_set(
        location, str(copy.folder), progress=progress, manifest_sha256=copy.manifest_sha256
    )
    say(
        f"staged: {_size(result.copied_bytes)} copied in {result.seconds:,.0f} s, all checksums agree, "
        f"{_size(result.kept_bytes)} were there already"
    )


def _only_copy(
    location: str, stage_folder: Path, error: RuntimeError, say: Callable[[str], None]
) -> StagedCopy:
    """The one copy of a data set that cannot be asked for its version; else raises.

    An unfinished copy counts, too: it may be of a newer version, and then the whole one is outdated.
    """
    copies = _copies(location, stage_folder)
    if not copies:
        raise error
    if len(copies) > 1:
        raise ValueError(
            f"{error}; {len(copies)} copies of it are in {stage_folder}, and which one is current cannot be "
            "told: wait for S3, or set data.path to one of them"
        )
    version = _version_of(copies[0])
    if not copies[0].name.endswith(f"-{version[:VERSION_DIGITS]}") or not _is_whole(copies[0], version):
        raise ValueError(f"{error}; the copy of it in {copies[0]} is not whole: start again when S3 answers")
    say(
        f"warning: the copy that an earlier run staged in {copies[0]} is used as it is, since its source "
        f"could not be read ({error})"
    )
    return StagedCopy(copies[0], version)


def _copy_folder(location: str, stage_folder: Path, version: str) -> Path:
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", location.rsplit("/", 1)[-1]).strip(".-")[:40]
    return stage_folder / f"{readable or 'data'}-{_mark(location)}-{version[:VERSION_DIGITS]}"


def _mark(location: str) -> str:
    """Tells apart data sets whose prefixes end alike."""
    return hashlib.sha256(location.encode()).hexdigest()[:8]


def _copies(location: str, stage_folder: Path) -> list[Path]:
    """Copies of any version, whole or not."""
    if not stage_folder.is_dir():
        return []
    ours = re.compile(rf".*-{_mark(location)}-[0-9a-f]{{{VERSION_DIGITS}}}")
    return sorted(path for path in stage_folder.iterdir() if ours.fullmatch(path.name) and path.is_dir())


def _version_of(folder: Path) -> str:
    """SHA-256 of the manifest in a folder; "" where there is none."""
    try:
        return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _is_whole(folder: Path, version: str) -> bool:
    if _version_of(folder) != version:
        return False
    local = LocalFolder(folder)
    manifest = Manifest.model_validate_json(local.read(MANIFEST_NAME))
    for entry in manifest.files:
        info = local.info(entry.name)
        if info is None or info.num_bytes != entry.bytes:
            return False
    return True


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _total_bytes(manifest: Manifest) -> int:
    return sum(entry.bytes for entry in manifest.files)


def _missing_bytes(folder: Path, manifest: Manifest) -> int:
    """What copying will still take of the disk; a wrong file stays until its successor is whole."""
    missing = 0
    for entry in manifest.files:
        path = folder / entry.name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            begun = path.with_name(f".{path.name}.partial")  # as LocalFolder names it
            missing += max(0, entry.bytes - (_disk_bytes(begun) if begun.is_file() else 0))
    return missing


def _disk_bytes(path: Path) -> int:
    """What a file takes of the disk: one that is written in pieces has holes."""
    return path.stat().st_blocks * 512


def _check_disk(location: str, stage_folder: Path, folder: Path, manifest: Manifest) -> None:
    """Raise ValueError where `folder` cannot be made, or has no room for what it lacks."""
    disk = next(path for path in (stage_folder.absolute(), *stage_folder.absolute().parents) if path.exists())
    if not disk.is_dir() or not os.access(disk, os.W_OK | os.X_OK):
        raise ValueError(
            f"{disk} is no folder that may be written to: set data.stage_folder to one on this machine's disk"
        )
    # In this order: another process may be copying there, and what it writes meanwhile counts for us.
    free = shutil.disk_usage(disk).free
    missing = _missing_bytes(folder, manifest)
    if missing <= free:
        return
    others = [path for path in _copies(location, stage_folder) if path != folder]
    raise ValueError(
        f"{stage_folder} has {_size(free)} free, and {_size(missing)} of {location} are to be copied there: "
        "set data.stage_folder to a larger disk, or free some space"
        + (f" (copies of its other versions: {_list(others)})" if others else "")
    )


def _name_older_copies(location: str, stage_folder: Path, current: Path, say: Callable[[str], None]) -> None:
    others = [path for path in _copies(location, stage_folder) if path != current]
    if others:
        say(f"copies of other versions of {location}, to be deleted if no run uses them: {_list(others)}")


def _list(copies: list[Path]) -> str:
    sizes = {copy: sum(_disk_bytes(path) for path in copy.rglob("*") if path.is_file()) for copy in copies}
    return ", ".join(f"{copy} ({_size(num_bytes)})" for copy, num_bytes in sizes.items())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
