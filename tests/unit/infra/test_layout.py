"""Keys, names and records: what they are, and what is refused."""

from __future__ import annotations

import pytest

from infra.layout import (
    MAX_RECORD_BYTES,
    End,
    Job,
    Keys,
    Node,
    check_deployment,
    code_key,
    group_name,
    read_record,
)

JOB = Job(deployment="mine", bucket="a-bucket", deadline=10)


def test_records_survive_json_and_leave_later_keys_aside() -> None:
    assert read_record(Job, JOB.to_json()) == JOB
    later = JOB.to_json().replace(b'"kind"', b'"of_a_later_version": 1, "kind"')
    assert read_record(Job, later) == JOB


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"format": 1',
        JOB.to_json().replace(b'"format": 1', b'"format": 2'),
        JOB.to_json().replace(b'"mine"', b'"../other"'),
        JOB.to_json().replace(b'"num_nodes": 1', b'"num_nodes": 0'),
        JOB.to_json().replace(b'"gpu"', b"0"),
        JOB.to_json() + b" " * MAX_RECORD_BYTES,
    ],
)
def test_what_is_no_job_is_refused_in_a_sentence(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^Job: .+") as refused:
        read_record(Job, content)
    assert "\n" not in str(refused.value)


def test_records_of_instances_are_bounded_in_what_they_name() -> None:
    with pytest.raises(ValueError, match="Node: instance"):
        read_record(Node, b'{"instance": "../../end"}')
    with pytest.raises(ValueError, match="End: status"):
        read_record(End, b'{"status": "unknown", "reason": "", "time": 0}')


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "a/b", "a" * 33, "a\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a deployment"):
        check_deployment(name)


def test_keys_sort_as_they_happened() -> None:
    keys = Keys("mine")
    events = [keys.event(time, "i-1", "started") for time in (9.5, 10.25, 1_800_000_000.0)]
    assert events == sorted(events)
    pieces = [keys.log("i-1", "train", number) for number in (0, 9, 10, 100_000)]
    assert pieces == sorted(pieces)


def test_nothing_leads_out_of_its_folder() -> None:
    keys = Keys("mine")
    for wrong in ("", "..", "a/b", "i-1\n", "-"):
        with pytest.raises(ValueError, match="is no name of an instance"):
            keys.node(wrong)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        code_key("../x")
    assert group_name("mine", "spot") == "sprint-mine-spot"
    with pytest.raises(ValueError, match="is no market"):
        group_name("mine", "other")
