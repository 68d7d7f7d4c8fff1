"""`python -m train.data.preflight` as a user calls it, on a tiny data set."""

from __future__ import annotations

from pathlib import Path

from data_prep.manifest import Manifest
from tests.integration.launch import read_json, run, write_recipe


def test_preflight_measures_concludes_and_writes_its_figures(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    recipe, out = write_recipe(tmp_path, prepared[0]), tmp_path / "figures.json"
    words = [str(recipe), "validation.resolution=48", "--seconds", "0.2", "--json", str(out)]
    done = run("train.data.preflight", *words)
    assert done.returncode == 0, done.stderr
    for told in ("160 train", "32 px: ", "48 px, validation: ", "a core", "page cache", "expected", "$"):
        assert told in done.stdout, done.stdout
    assert "verdict: " in done.stdout and "share" in done.stdout  # no GPU: loader and model share the cores
    figures = read_json(out)
    (training,) = figures["training"]
    assert (training["resolution"], training["epochs"]) == (32, 3)
    assert training["loader"] > 0 and training["model"] > 0
    assert figures["validation"]["resolution"] == 48 and figures["validation"]["model"] > 0
    assert figures["limit"] in ("data-bound", "model-bound", "balanced") and figures["verdict"]
    assert figures["data_bytes"] == prepared[1].num_bytes and figures["usable_ram_bytes"] > 0
    assert 0 < figures["expected_images_per_second_per_rank"]["32"] < training["model"]
    assert figures["epoch_seconds"] > 0 and figures["epoch_usd"] > 0 and figures["free_bytes"] > 0
    assert not (tmp_path / "runs").exists()
