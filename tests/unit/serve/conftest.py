"""Runs and exports that the tests of serving share; none is to be written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from tests.unit.serve.trained_run import OWN, TIMM, build_run


@pytest.fixture(scope="session")
def timm_run(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of timm's."""
    return build_run(tmp_path_factory.mktemp("runs") / "small", prepared[0], TIMM)


@pytest.fixture(scope="session")
def own_run(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own network, with flip averaging."""
    return build_run(
        tmp_path_factory.mktemp("runs") / "own", prepared[0], OWN, flip_average=True, crop_ratio=1.0
    )
