"""How the ranks of `torchrun … -m data_prep prepare` find each other: through files in the output, no more.

Rank 0 writes a plan; every rank answers that it has seen this very plan, so that files which an earlier,
interrupted start left cannot mislead anybody. An output that the ranks do not share is found at once.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Callable

from data_prep.journal import Journal

MEET_SECONDS = float(os.environ.get("PREPARE_MEET_SECONDS", "300"))  # until all ranks have seen the output
QUIET_SECONDS = float(os.environ.get("PREPARE_QUIET_SECONDS", "900"))  # without a new shard of another rank
POLL_SECONDS = 0.5
SAY_EVERY_SECONDS = 60.0


def rank_and_world_size() -> tuple[int, int]:
    """As torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def lead(journal: Journal, world_size: int, plan: dict[str, object]) -> None:
    """Rank 0: publish the plan and wait until every other rank has taken it.

    Raises:
        ValueError: a rank sees other source files or settings.
        RuntimeError: a rank does not appear in the output.
    """
    run = journal.run

    def all_joined() -> bool:
        members: dict[str, str] = {}
        joined = True
        for rank in range(1, world_size):
            hello = journal.load_note(f"rank-{rank}")
            members[str(rank)] = str(hello.get("nonce", ""))
            joined = joined and hello.get("accepted") == run
            if hello.get("accepted") == f"other {run}":
                raise ValueError(
                    f"rank {rank} sees other source files or settings than rank 0: give all machines the "
                    "same source and the same command"
                )
        if members != lead_state["members"]:
            journal.save_note("plan", {**plan, "run": run, "members": members})
            lead_state["members"] = members
        return joined

    lead_state: dict[str, object] = {"members": None}
    _wait(
        all_joined,
        MEET_SECONDS,
        f"not all of the {world_size} ranks have come to {journal.folder.location}",
        "--out must be a folder that all machines share, or s3://",
    )


def follow(journal: Journal, rank: int) -> dict[str, object] | None:
    """Another rank: wait for rank 0's plan, take it over (its run too); None where it is of other files.

    Raises:
        RuntimeError: no plan comes.
    """
    nonce = uuid.uuid4().hex
    journal.save_note(f"rank-{rank}", {"nonce": nonce})
    found: dict[str, object] = {}

    def have_plan() -> bool:
        plan = journal.load_note("plan")
        members = plan.get("members")
        if isinstance(members, dict) and members.get(str(rank)) == nonce:
            found.update(plan)
        return bool(found)

    _wait(
        have_plan,
        MEET_SECONDS,
        f"rank {rank} does not hear from rank 0 in {journal.folder.location}",
        "--out must be a folder that all machines share, or s3://",
    )
    same = found["fingerprint"] == journal.fingerprint
    journal.run = str(found["run"])
    journal.save_note(
        f"rank-{rank}", {"nonce": nonce, "accepted": journal.run if same else f"other {journal.run}"}
    )
    return found if same else None


def wait_for_records(journal: Journal, expected: dict[str, int]) -> None:
    """Rank 0, at the end: until every split has its number of records of this run.

    Raises:
        RuntimeError: nothing new has come for QUIET_SECONDS.
    """
    state = {"missing": -1, "since": time.monotonic(), "said": time.monotonic()}

    def complete() -> bool:
        missing = 0
        for split, count in expected.items():
            done = sum(record.run == journal.run for record in journal.load(split).values())
            missing += count - done
        now = time.monotonic()
        if missing != state["missing"]:
            state.update(missing=missing, since=now)
        if missing and now - state["since"] > QUIET_SECONDS:
            raise RuntimeError(
                f"{missing} shards of other ranks have not come for {QUIET_SECONDS:.0f} s: see those ranks' "
                "output, then run the same command again"
            )
        if missing and now - state["said"] > SAY_EVERY_SECONDS:
            print(f"waiting for {missing} shards of other ranks", file=sys.stderr)
            state["said"] = now
        return missing == 0

    _wait(complete, float("inf"), "", "")


def _wait(condition: Callable[[], bool], seconds: float, what: str, remedy: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} after {seconds:.0f} s: {remedy}")
        time.sleep(POLL_SECONDS)
