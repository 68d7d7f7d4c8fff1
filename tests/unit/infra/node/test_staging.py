"""Where an instance takes its data from."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.layout import Job
from infra.node import commands, staging
from infra.node.metadata import Metadata
from infra.node.process import Ended
from infra.node.settings import Settings, read_settings

MANIFEST = b'{"format": 1}'


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    class Elsewhere(Metadata):
        def text(self, path: str) -> str:
            return ""

    variables = {"SPRINT_DEPLOYMENT": "mine", "SPRINT_BUCKET": "b", "SPRINT_ROOT": str(tmp_path)}
    return read_settings(variables | {"SPRINT_INSTANCE": "i-1"}, Elsewhere({}))


def stage(settings: Settings, monkeypatch: pytest.MonkeyPatch, codes: list[int]) -> list[str]:
    """The sources that were copied from, in turn, each ending with the next of `codes`."""

    class Bucket:
        def read(self, name: str) -> bytes:
            return MANIFEST

    sources: list[str] = []

    def run(words: list[str]) -> Ended:
        sources.append(words[-2])
        return Ended(code=codes[len(sources) - 1], stopped_for=None, last_words="error: no")

    monkeypatch.setattr(staging, "open_folder", lambda location: Bucket())
    fields: dict[str, Any] = {
        "deployment": "mine",
        "kind": "train",
        "bucket": "bucket",
        "region": "us-east-1",
        "data": "s3://b/data/imagenet",
        "deadline": 2_000_000_000,
    }
    target = staging.stage_data(Job(**fields), settings, run, lambda seconds: None)
    assert hashlib.sha256(MANIFEST).hexdigest()[:8] in str(target)
    return sources


def put(settings: Settings, name: str, content: bytes) -> Path:
    folder = settings.data_volume / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(content)
    return folder


def test_the_data_volume_is_used_where_it_has_this_very_version(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(settings, "another", b"{}")
    mine = put(settings, "imagenet", MANIFEST)
    assert stage(settings, monkeypatch, [0]) == [str(mine)]


def test_another_version_on_the_volume_is_left_alone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(settings, "imagenet", b"{}")
    assert stage(settings, monkeypatch, [0]) == ["s3://b/data/imagenet"]


def test_a_damaged_volume_costs_no_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = put(settings, "imagenet", MANIFEST)
    assert stage(settings, monkeypatch, [1, 0]) == [str(mine), "s3://b/data/imagenet"]


def test_shards_for_ffcv_without_it_are_a_warning(
    prepared: tuple[Path, Any], prepared_tars: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "FFCV could not be installed" in staging.slow_loader(prepared[0])
    assert staging.slow_loader(prepared_tars[0]) == ""


def test_an_on_demand_instance_counts_its_own_price(settings: Settings) -> None:
    fields: dict[str, Any] = {"deployment": "mine", "bucket": "bucket", "deadline": 2_000_000_000}
    job = Job(**fields, usd_per_hour=2.0, market_usd_per_hour={"spot": 2.0, "on-demand": 4.6})
    words = commands.overrides(job, replace(settings, market="on-demand"), Path("data"))
    assert "budget.usd_per_hour=4.6" in words
    assert "budget.usd_per_hour=2.0" in commands.overrides(
        job, replace(settings, market="spot"), Path("data")
    )
