"""The state folder: what is on record, who may change it, and what is said after Ctrl-C."""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import pytest

from infra.deployment import Base, StateFolder
from infra.errors import UserError
from infra.remains import what_remains
from tests.unit.infra.fake_cloud import deployment


@pytest.fixture
def states(tmp_path: Path) -> StateFolder:
    return StateFolder(tmp_path / ".infra")


def test_what_is_saved_is_found_again(states: StateFolder) -> None:
    assert states.load("mine") is None and states.names() == []
    states.save(deployment(stage="up"))
    assert states.load("mine") == deployment(stage="up", created=states.load("mine").created)  # type: ignore[union-attr]
    assert states.names() == ["mine"]


def test_a_damaged_record_is_named(states: StateFolder) -> None:
    states.save(deployment())
    path = states.folder("mine") / "deployment.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"deployment\.json is damaged"):
        states.load("mine")


def test_two_ups_at_once_are_refused(states: StateFolder) -> None:
    with (
        states.lock("mine"),
        states.lock("other"),
        pytest.raises(UserError, match="another up, down or prepare of mine is at work"),
        states.lock("mine"),
    ):
        pass
    with states.lock("mine"):
        pass


def test_a_second_command_waits_for_the_lasting_part(states: StateFolder) -> None:
    order = []

    def other() -> None:
        with states.base_lock("us-east-1"):
            order.append("other")

    with states.base_lock("us-east-1"):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]


def test_names_that_lead_elsewhere_are_refused(states: StateFolder) -> None:
    for name in ("../x", "A", "a/b", "", "a" * 33):
        with pytest.raises(ValueError, match="no name of a deployment"):
            states.folder(name)


def remains(states: StateFolder, name: str | None = "mine") -> str:
    return what_remains(argparse.Namespace(state_dir=states.root, name=name, command="up"))


def test_after_ctrl_c_it_says_what_exists_and_costs(states: StateFolder) -> None:
    assert remains(states) == "Nothing exists in AWS, and nothing costs money."
    states.save_base(Base(account_id="1", region="us-east-1", bucket="b"))
    states.save(deployment(stage="uploading"))
    assert "No instance runs" in remains(states) and "The same command goes on" in remains(states)
    states.save(deployment(stage="applying"))
    assert "mine is half made: its instances may run, at up to $4.64 an hour" in remains(states)
    assert "python -m infra down mine removes it" in remains(states)
    states.save(deployment(stage="up"))
    assert "goes on in the cloud, at up to $4.64 an hour" in remains(states, None)
    states.save(deployment(stage="down"))
    assert "No instance runs" in remains(states)
    (states.folder("mine") / "deployment.json").write_text("{")
    assert "status says what exists" in remains(states)
