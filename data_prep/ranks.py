"""How the ranks of `torchrun … -m data_prep prepare` work together: through files in the output, no more.

First all meet: rank 0 names its run, and every other rank answers to this very run, so that files which an
earlier, interrupted start left cannot mislead anybody; an output that they do not share is found at once.
Then rank 0 publishes the plan, each rank takes its share of it, and rank 0 waits for their records.
A rank that stops with an error says so in its file, and the others end too.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable

from data_prep.journal import Journal

MEET_SECONDS = float(os.environ.get("PREPARE_MEET_SECONDS", "300"))  # until all ranks have seen the output
QUIET_SECONDS = float(os.environ.get("PREPARE_QUIET_SECONDS", "900"))  # without anything new of another rank
FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 0.1, 3.0  # growing: each look costs a request where it is S3
SAY_EVERY_SECONDS = 60.0
SHARE_IT = "--out must be a folder that all machines share, or s3://"


def rank_and_world_size() -> tuple[int, int]:
    """As torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def meet(journal: Journal, world_size: int) -> None:
    """Rank 0: wait until every other rank has come to the output and has the same source and settings.

    Raises:
        ValueError: a rank sees other source files or settings.
        RuntimeError: a rank does not appear in the output.
    """
    called: dict[str, str] | None = None
    refused: list[int] = []

    def all_here() -> bool:
        nonlocal called, refused
        notes = {rank: journal.load_note(f"rank-{rank}") for rank in range(1, world_size)}
        # Whoever finds its own nonce here has been seen by this very run of rank 0.
        members = {str(rank): str(note.get("nonce", "")) for rank, note in notes.items()}
        if members != called:
            same = {"run": journal.run, "fingerprint": journal.fingerprint, "world_size": world_size}
            journal.save_note("meeting", {**same, "members": members})
            called = members
        refused = [rank for rank, note in notes.items() if note.get("refused") == journal.run]
        return all(journal.run in (note.get("run"), note.get("refused")) for note in notes.values())

    here = journal.folder.location
    # Also where one has refused: the others must have come, too, to hear that rank 0 has stopped.
    try:
        _wait(all_here, MEET_SECONDS, f"not all of the {world_size} ranks have come to {here}", SHARE_IT)
    except RuntimeError:
        if not refused:
            raise
    if refused:
        raise ValueError(
            f"rank {refused[0]} sees other source files or settings than rank 0: give all machines the same "
            "source and the same command"
        )


def join(journal: Journal, rank: int, world_size: int) -> None:
    """Another rank: find rank 0 and become part of its run.

    Raises:
        ValueError: this rank sees other source files or settings than rank 0.
        RuntimeError: rank 0 does not appear in the output.
    """
    nonce = uuid.uuid4().hex
    journal.save_note(f"rank-{rank}", {"nonce": nonce})
    meeting: dict[str, object] = {}

    def called() -> bool:
        note = journal.load_note("meeting")
        members = note.get("members")
        if isinstance(members, dict) and members.get(str(rank)) == nonce:
            meeting.update(note)
        return bool(meeting)

    where = f"rank {rank} does not hear from rank 0 in {journal.folder.location}"
    _wait(called, MEET_SECONDS, where, SHARE_IT)
    journal.run = str(meeting["run"])
    if (meeting["fingerprint"], meeting["world_size"]) != (journal.fingerprint, world_size):
        journal.save_note(f"rank-{rank}", {"nonce": nonce, "refused": journal.run})
        raise ValueError(f"rank {rank} sees other source files or settings than rank 0")
    journal.save_note(f"rank-{rank}", {"nonce": nonce, "run": journal.run})


def publish_plan(journal: Journal, world_size: int, shards: list[list[object]]) -> None:
    """Rank 0: tell the others what there is to do, and wait until all know it."""
    content: dict[str, object] = {"fingerprint": journal.fingerprint, "run": journal.run, "shards": shards}
    journal.save_note("plan", content)

    def all_know() -> bool:
        notes = [journal.load_note(f"rank-{rank}") for rank in range(1, world_size)]
        _check_others(notes, journal.run)
        return all(note.get("planned") == journal.run for note in notes)

    if world_size > 1:
        _wait(all_know, MEET_SECONDS, "not all of the other ranks answer", "see their output")


def take_plan(journal: Journal, rank: int) -> list[list[object]]:
    """Another rank: wait for rank 0's plan of this run, which may first check or measure much.

    Raises:
        RuntimeError: rank 0 has stopped, or is silent for too long.
    """
    plan: dict[str, object] = {}

    def published() -> bool:
        _check_leader(journal)
        note = journal.load_note("plan")
        if note.get("run") == journal.run:
            plan.update(note)
        return bool(plan)

    _wait(published, QUIET_SECONDS, f"rank {rank} has no plan from rank 0", "see the output of rank 0")
    journal.save_note(f"rank-{rank}", {"run": journal.run, "planned": journal.run})
    return plan["shards"]  # type: ignore[return-value]


def still_led(journal: Journal) -> Callable[[], None]:
    """For another rank: a function that raises RuntimeError where rank 0 has stopped or was started anew."""

    def check() -> None:
        _check_leader(journal)
        if journal.load_note("meeting").get("run") != journal.run:
            raise RuntimeError("another start of prepare has taken the output over")

    return check


def say_stopped(journal: Journal, rank: int) -> None:
    """This rank ends with an error: the others shall not wait for it."""
    journal.save_note("stopped" if rank == 0 else f"rank-{rank}", {"stopped": journal.run})


def wait_for_records(journal: Journal, expected: dict[str, int], world_size: int) -> None:
    """Rank 0, at the end: until every split has its number of records of this run.

    Raises:
        RuntimeError: another rank has stopped, or nothing new has come for QUIET_SECONDS.
    """
    state = {"missing": -1, "since": time.monotonic(), "said": time.monotonic()}

    def complete() -> bool:
        missing = sum(expected.values())
        for found in journal.load_all(expected).values():
            missing -= sum(record.run == journal.run for record in found.values())
        now = time.monotonic()
        if missing != state["missing"]:
            state.update(missing=missing, since=now)
        if not missing:
            return True
        _check_others((journal.load_note(f"rank-{rank}") for rank in range(1, world_size)), journal.run)
        if now - state["since"] > QUIET_SECONDS:
            raise RuntimeError(
                f"{missing} shards of other ranks have not come for {QUIET_SECONDS:.0f} s: see those ranks' "
                "output, then run the same command again"
            )
        if now - state["said"] > SAY_EVERY_SECONDS:
            print(f"waiting for {missing} shards of other ranks", file=sys.stderr)
            state["said"] = now
        return False

    _wait(complete, float("inf"), "", "")


def _check_leader(journal: Journal) -> None:
    if journal.load_note("stopped").get("stopped") == journal.run:
        raise RuntimeError("rank 0 has stopped: see its output, then run the same command again")


def _check_others(notes: Iterable[dict[str, object]], run: str) -> None:
    for rank, note in enumerate(notes, start=1):
        if note.get("stopped") == run:
            raise RuntimeError(f"rank {rank} has stopped: see its output, then run the same command again")


def _wait(condition: Callable[[], bool], seconds: float, what: str, remedy: str) -> None:
    deadline, pause = time.monotonic() + seconds, FIRST_POLL_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} after {seconds:.0f} s: {remedy}")
        time.sleep(pause)
        pause = min(1.3 * pause, LAST_POLL_SECONDS)
