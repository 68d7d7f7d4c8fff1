"""The same recipe on CUDA: NCCL, pinned batches, bf16 and fp16 with a scaler. Skipped without a GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from tests.conftest import ROOT
from tests.integration.launch import command, read_json, write_recipe


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("loader", ["reference", pytest.param("ffcv", marks=pytest.mark.ffcv)])
def test_trains_on_a_gpu(
    prepared: tuple[Path, Manifest], tmp_path: Path, precision: str, loader: str
) -> None:
    recipe = write_recipe(tmp_path, prepared[0], **{"mode: fp32": f"mode: {precision}"})
    words = ("train", str(recipe), f"run.folder={tmp_path}", f"data.loader={loader}")
    result = subprocess.run(
        command(*words), cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert read_json(tmp_path / "tiny" / "summary.json")["final_top5"] == 1.0
