"""How many cores a rank takes for itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from train import distributed as module
from train.distributed import distributed, quota_in_cores, rank_cores


@pytest.mark.parametrize(
    ("num_allowed", "quota", "local_world_size", "share"),
    [
        (16, None, 1, 16),
        (16, None, 4, 4),
        (16, None, 5, 3),
        (2, None, 8, 1),
        (64, 8.0, 4, 2),
        (64, 2.5, 1, 2),
        (64, 0.5, 1, 1),
        (4, 96.0, 2, 2),
    ],
)
def test_rank_cores(num_allowed: int, quota: float | None, local_world_size: int, share: int) -> None:
    assert rank_cores(num_allowed, quota, local_world_size) == share


def cgroups(tmp_path: Path, place: str, limits: dict[str, str]) -> tuple[Path, Path]:
    """A tree of cgroups, each with its `cpu.max`, and the file that says which one the process is in."""
    root = tmp_path / "cgroup"
    for name, content in limits.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "cpu.max").write_text(content)
    membership = tmp_path / "membership"
    membership.write_text(place)
    return root, membership


@pytest.mark.parametrize(
    ("place", "limits", "quota"),
    [
        ("0::/\n", {".": "400000 100000\n"}, 4.0),  # a container
        ("0::/\n", {".": "max 100000\n"}, None),
        ("0::/\n", {}, None),  # the real root has no such file
        ("0::/job/step\n", {"job": "250000 100000\n", "job/step": "max 100000\n"}, 2.5),
        ("0::/job/step\n", {"job": "800000 100000\n", "job/step": "150000 50000\n"}, 3.0),
        ("0::/of/the/host\n", {".": "200000 100000\n"}, 2.0),  # named from outside of the container
        ("12:cpu,cpuacct:/x\n0::/job\n", {"job": "100000 100000\n", "x": "700000 100000"}, 1.0),
        ("12:cpu,cpuacct:/x\n", {"x": "700000 100000\n"}, None),  # v1
        ("0::/\n", {".": "nonsense\n"}, None),
    ],
)
def test_quota(tmp_path: Path, place: str, limits: dict[str, str], quota: float | None) -> None:
    assert quota_in_cores(*cgroups(tmp_path, place, limits)) == quota


def test_quota_of_a_system_without_cgroups(tmp_path: Path) -> None:
    assert quota_in_cores(tmp_path / "none", tmp_path / "nothing") is None


def test_ranks_of_a_machine_share_the_cores_that_they_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = module.torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3, 15)))
    monkeypatch.setattr(module, "quota_in_cores", lambda: 9.5)
    monkeypatch.setattr(module.torch, "set_num_threads", lambda _: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with distributed() as ranks:
        assert ranks.num_cores == 2
    monkeypatch.setattr(module, "quota_in_cores", lambda: None)
    with distributed() as ranks:
        assert ranks.num_cores == 3
    assert module.torch.get_num_threads() == threads
