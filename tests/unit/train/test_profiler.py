"""The profiler on a small loop, and its figures from a trace whose answer is known."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from train.config import ProfileSection
from train.profile_page import profile_page, read_trace, summarize
from train.profiler import StepProfiler

CPU = torch.device("cpu")


def train_a_little(profiler: StepProfiler, num_steps: int, wait: float = 0.0) -> list[str]:
    """A loop as the real one; the lines that it would say."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lines = []

    def batches() -> Iterator[torch.Tensor]:
        for _ in range(num_steps):
            time.sleep(wait)
            yield torch.randn(256, 256)

    for num_done, images in enumerate(profiler.waiting(batches()), start=1):
        with profiler.part("forward"):
            loss = model(images).square().mean()
        with profiler.part("backward"):
            loss.backward()
        with profiler.part("update"):
            optimizer.step()
            optimizer.zero_grad()
        lines.append(profiler.step(num_done))
    lines.append(profiler.close())
    return [line for line in lines if line is not None]


def test_profile_of_a_loop(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileSection(steps=(4, 9)), tmp_path, 0, CPU)
    lines = train_a_little(profiler, 12, wait=0.01)
    assert len(lines) == 1 and "profile of 5 steps" in lines[0] and "profile.md" in lines[0]
    summary = json.loads((tmp_path / "profile" / "profile.json").read_text())
    parts = summary["parts"]
    assert summary["num_steps"] == 5 and summary["steps"] == [4, 9]
    assert parts["data"]["seconds"] >= 0.01 and summary["data_wait_seconds"] == parts["data"]["seconds"]
    assert min(parts[name]["seconds"] for name in ("forward", "backward", "update")) > 0
    # All that the loop does lies in a part, so they add up to about the step.
    assert 0.8 < sum(part["share"] for part in parts.values()) <= 1.001
    work = sum(parts[name]["share"] for name in ("forward", "backward", "update"))
    assert summary["overhead"] == pytest.approx(1 - work)
    assert summary["plain_step_seconds"] >= 0.01
    operators = summary["operators"]
    assert len(operators) == 10 and "aten::addmm" in {operator["name"] for operator in operators}
    assert operators[0]["seconds"] == max(operator["seconds"] for operator in operators)

    names = {event["name"] for event in read_trace(tmp_path / "profile" / "trace.json.gz")}
    assert {"part: forward", "part: backward", "aten::addmm"} <= names
    page = (tmp_path / "profile" / "profile.md").read_text()
    assert "| forward |" in page and "| backward |" in page and "overhead" in page


@pytest.mark.parametrize(("config", "rank"), [(None, 0), (ProfileSection(steps=(0, 2)), 1)])
def test_nothing_is_written_without_a_section_or_on_other_ranks(
    tmp_path: Path, config: ProfileSection | None, rank: int
) -> None:
    assert train_a_little(StepProfiler(config, tmp_path, rank, CPU), 4) == []
    assert list(tmp_path.iterdir()) == []


def test_steps_from_the_first_on(tmp_path: Path) -> None:
    train_a_little(StepProfiler(ProfileSection(steps=(0, 1)), tmp_path, 0, CPU), 3)
    summary = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert summary["num_steps"] == 1 and summary["plain_step_seconds"] is None


def test_a_training_that_ends_early_leaves_the_steps_it_did(tmp_path: Path) -> None:
    lines = train_a_little(StepProfiler(ProfileSection(steps=(2, 20)), tmp_path, 0, CPU), 5)
    assert "profile of 3 steps" in lines[0]


def test_a_training_that_ends_before_leaves_nothing(tmp_path: Path) -> None:
    assert train_a_little(StepProfiler(ProfileSection(steps=(10, 20)), tmp_path, 0, CPU), 5) == []
    assert list(tmp_path.iterdir()) == []


def test_a_profiler_that_fails_does_not_end_the_training(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    lines = train_a_little(StepProfiler(ProfileSection(steps=(1, 2)), tmp_path, 0, CPU), 4)
    assert len(lines) == 1 and lines[0].startswith("warning: the profiler failed (FileExistsError")


def test_parts_of_the_device_follow_from_where_kernels_were_launched() -> None:
    def event(category: str, name: str, ts: float, dur: float, correlation: int | None = None) -> dict:
        return {"cat": category, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}

    events = [
        event("user_annotation", "part: forward", 0, 10),
        event("user_annotation", "part: backward", 20, 10),
        event("gpu_user_annotation", "part: forward", 0, 900),  # must not count again
        event("cuda_runtime", "cudaLaunchKernel", 5, 1, 1),
        event("cuda_runtime", "cudaLaunchKernel", 6, 1, 2),
        event("cuda_runtime", "cudaLaunchKernel", 25, 1, 3),
        event("cuda_runtime", "cudaLaunchKernel", 15, 1, 4),  # between the parts
        event("kernel", "gemm", 100, 200, 1),
        event("kernel", "gemm", 200, 200, 2),  # overlaps by 100
        event("kernel", "backward gemm", 400, 400, 3),
        event("gpu_memcpy", "copy", 900, 50, 4),
    ]
    summary = summarize(events, num_steps=1, wall_seconds=1e-3, on_cuda=True)
    assert summary["parts"]["forward"]["share"] == pytest.approx(0.3)
    assert summary["parts"]["backward"]["share"] == pytest.approx(0.4)
    assert summary["overhead"] == pytest.approx(0.3)
    assert summary["device_idle"] == pytest.approx(0.25)
    assert [operator["name"] for operator in summary["operators"]] == ["gemm", "backward gemm", "copy"]
    page = profile_page({**summary, "steps": [0, 1]})
    assert "| update |" not in page and "waits for data" not in page  # there are no such marks
    assert "the device is idle: **25.0%**" in page


def test_time_of_operators_is_their_own() -> None:
    def operator(name: str, ts: float, dur: float, thread: int = 1) -> dict:
        return {"cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": thread}

    events = [operator("outer", 0, 100), operator("inner", 10, 60), operator("inmost", 20, 10)]
    events += [operator("inner", 80, 10), operator("other thread", 0, 40, thread=2)]
    summary = summarize(events, num_steps=1, wall_seconds=1e-4, on_cuda=False)
    own = {operator["name"]: operator["seconds"] * 1e6 for operator in summary["operators"]}
    assert own == pytest.approx({"outer": 30, "inner": 60, "inmost": 10, "other thread": 40})
