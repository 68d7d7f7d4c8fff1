"""What the primary rank does for all of them: its result, its error, and a stop while it is busy."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from train import distributed
from train.build_run import build_on_ranks
from train.config import ModelSection
from train.distributed import PrimaryError, Ranks, StopWanted

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"), 1)


@pytest.fixture
def meetings(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """What the ranks told each other, a list a meeting."""
    held: list[list[float]] = []

    def meet(ranks: Ranks, values: list[float]) -> list[float]:
        held.append(values)
        return values

    monkeypatch.setattr(Ranks, "sum", meet)
    monkeypatch.setattr(distributed, "MEETING_SECONDS", 0.01)
    return held


def test_ranks_meet_while_the_primary_is_busy(meetings: list[list[float]]) -> None:
    enough = threading.Event()

    def wants_to_stop() -> bool:
        if len(meetings) == 4:
            enough.set()
        return False

    def download() -> str:
        assert enough.wait(60)
        return "weights"

    assert ALONE.on_primary_in_thread(download, wants_to_stop) == "weights"
    assert len(meetings) >= 5 and [busy for busy, _ in meetings[:4]] == [True] * 4


def test_an_error_in_the_thread_is_the_primarys(meetings: list[list[float]]) -> None:
    def download() -> None:
        raise OSError("no room on the disk")

    with pytest.raises(PrimaryError, match=r"^no room on the disk$"):
        ALONE.on_primary_in_thread(download)


@pytest.mark.parametrize("error", [TypeError("no such argument"), KeyError("layer9"), ImportError("no timm")])
def test_any_error_of_the_primary_reaches_all_ranks(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []  # what the other ranks get
    monkeypatch.setattr(Ranks, "broadcast", lambda ranks, value: told.append(value) or value)

    def build() -> None:
        raise error

    for call in (ALONE.on_primary, ALONE.on_primary_in_thread):
        with pytest.raises(PrimaryError, match=f"{type(error).__name__}: .*{error.args[0]}"):
            call(build)
        assert "in build" in capsys.readouterr().err  # where it was
    assert len(told) == 2


def test_a_download_of_weights_can_be_stopped(
    meetings: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = threading.Event()

    def build(*arguments: Any) -> None:
        endless.wait(60)
        raise ValueError("too late")

    monkeypatch.setattr("train.build_run.build_model", build)
    config = ModelSection(name="test_resnet", pretrained=True)
    with pytest.raises(StopWanted):
        build_on_ranks(config, 4, False, ALONE, lambda: len(meetings) >= 2)
    assert len(meetings) == 3
    endless.set()
