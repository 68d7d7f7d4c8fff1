"""What follows from the end of a start."""

from __future__ import annotations

import pytest

from infra.node.policy import MAX_RESTARTS, RestartPolicy, too_many_instances

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("status", "reason", "action", "ends_as"),
    [
        ("finished", "16 of 16 epochs", "end", "finished"),
        ("finished", "12 of 16 epochs, early stopping", "end", "finished"),
        ("finished", "9 of 16 epochs, budget", "end", "stopped"),
        ("failed", "the loss is not finite", "end", "failed"),
        ("failed", "another machine goes on with this run: its mirror was taken over", "leave", "failed"),
        ("restart", "SIGTERM", "again", "failed"),
        (None, "killed", "again", "failed"),
    ],
)
def test_each_ending_has_its_consequence(status: str | None, reason: str, action: str, ends_as: str) -> None:
    decision = RestartPolicy(3).decide(status, reason, NOW, NOW + 600)
    assert (decision.action, decision.status, decision.reason) == (action, ends_as, reason)


def test_deaths_are_counted_by_the_hour() -> None:
    policy = RestartPolicy(3)
    assert [policy.decide(None, "", NOW, NOW + t).action for t in (0, 1800, 3500)] == [
        "again",
        "again",
        "end",
    ]
    slow = RestartPolicy(3)
    assert {slow.decide(None, "", NOW, NOW + t).action for t in range(0, 36000, 1900)} == {"again"}
    assert RestartPolicy(3, deaths=[NOW - 60, NOW - 30]).decide(None, "", NOW, NOW).action == "end"
    assert RestartPolicy(3, deaths=[NOW - 7200, NOW - 3700]).decide(None, "", NOW, NOW).action == "again"


def test_waits_grow_with_deaths_and_keep_restarts_a_minute_apart() -> None:
    policy = RestartPolicy(5, between_starts_seconds=60, retry_seconds=15)
    assert [policy.decide(None, "", NOW, NOW).wait_seconds for _ in range(3)] == [15, 30, 60]
    assert policy.decide("restart", "", NOW, NOW + 10).wait_seconds == 50
    assert policy.decide("restart", "", NOW, NOW + 900).wait_seconds == 0


def test_restarts_do_not_count_as_deaths_but_are_bounded() -> None:
    policy = RestartPolicy(1)
    actions = [policy.decide("restart", "rebalance", NOW, NOW).action for _ in range(MAX_RESTARTS + 1)]
    assert actions == ["again"] * MAX_RESTARTS + ["end"]


def test_instances_that_only_begin_are_not_started_for_ever() -> None:
    assert too_many_instances(10, num_nodes=1) is None
    assert too_many_instances(40, num_nodes=4) is None
    assert "11 instances" in str(too_many_instances(11, num_nodes=1))
