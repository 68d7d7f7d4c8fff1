"""Pretrained weights: from a cache, from the primary rank, or said not to be there."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from huggingface_hub import constants
from safetensors.torch import save_file

from data_prep.manifest import Manifest
from tests.integration.launch import run, write_recipe
from train.build_run import build_on_ranks
from train.config import ModelSection
from train.distributed import Ranks
from train.models import hub
from train.models.build import build_model

torch.set_num_threads(1)

NAME = "test_resnet"


@pytest.fixture
def lookups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network, and empty caches; the hosts whose names were looked up."""
    hosts: list[str] = []

    def look_up(host: str, *rest: Any, **more: Any) -> Any:
        hosts.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    return hosts


def build(seed: int = 0, num_classes: int = 7, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return build_model(ModelSection.model_validate({"name": NAME} | changes), num_classes)


def fill_timm_cache(cache: Path, weights: dict[str, torch.Tensor]) -> None:
    """A Hugging Face cache with the model's one file."""
    repository = timm.get_pretrained_cfg(NAME).hf_hub_id
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    whole = {key: value.contiguous() for key, value in weights.items()}
    save_file(whole, folder / "snapshots" / commit / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], head: str = "no head") -> bool:
    return all(torch.equal(first[key], second[key]) for key in first if not key.startswith(head))


@pytest.mark.parametrize(("library", "name"), [("timm", NAME), ("torchvision", "squeezenet1_1")])
def test_without_a_network_the_same_as_random_and_said(library: str, name: str, lookups: list[str]) -> None:
    model = build(library=library, name=name, pretrained="if_available")
    assert same(model.state_dict(), build(library=library, name=name).state_dict())
    assert model.weights_at_start == "random"
    assert "does not answer" in model.weights_note and "random weights" in model.weights_note
    assert len(lookups) == 1  # the libraries' own clients would ask a dozen times


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_insisting_is_one_sentence_with_the_ways_out(library: str, lookups: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        build(library=library, name="resnet18", pretrained=True)
    for words in ("if_available", "model.checkpoint=", "model.pretrained=false", "does not answer"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_published_weights(lookups: list[str]) -> None:
    model = build(name="efficientnet_b0_gn", pretrained="if_available")
    assert model.weights_at_start == "random" and "knows of none" in model.weights_note
    assert lookups == []


def test_the_cache_serves_without_a_network(lookups: list[str]) -> None:
    published = {k: v + 1 for k, v in build(seed=5, num_classes=1000).state_dict().items()}
    fill_timm_cache(Path(constants.HF_HUB_CACHE), published)
    for pretrained in (True, "if_available"):
        model = build(pretrained=pretrained)
        assert same(model.state_dict(), published, head="fc.") and model.fc.out_features == 7
        assert model.weights_at_start == "pretrained" and NAME in model.weights_note
    assert not constants.HF_HUB_OFFLINE  # as before
    weights = torchvision.models.squeezenet1_1().state_dict()
    url = torchvision.models.get_model_weights("squeezenet1_1")["DEFAULT"].url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(weights, cached)
    model = build(library="torchvision", name="squeezenet1_1", pretrained="if_available")
    assert same(model.state_dict(), weights, head="classifier")
    assert model.weights_at_start == "pretrained"


def test_a_fault_of_the_recipe_is_not_taken_for_missing_weights(lookups: list[str]) -> None:
    with pytest.raises(ValueError, match=r"model\.options: timm's test_resnet takes no option 'widht'"):
        build(pretrained="if_available", options={"widht": 2})


def test_a_checkpoint_goes_before_if_available(lookups: list[str], tmp_path: Path) -> None:
    weights = build(seed=3).state_dict()
    torch.save(weights, tmp_path / "mine.pth")
    model = build(pretrained="if_available", checkpoint=tmp_path / "mine.pth")
    assert same(model.state_dict(), weights) and lookups == []
    assert model.weights_at_start == "checkpoint"


def test_a_server_that_hangs_is_not_waited_for() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not hub.answers(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.2)


def test_inception_sees_the_same_pixels_whoever_brings_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(hub, "answers", lambda *arguments: True)

    def get_model(name: str, **options: Any) -> Any:
        seen.append(options["transform_input"])
        raise RuntimeError("far enough")

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    for pretrained in (True, False):
        for options in ({}, {"transform_input": True}):
            with pytest.raises((ValueError, RuntimeError), match="far enough"):
                build(library="torchvision", name="inception_v3", pretrained=pretrained, options=options)
    assert seen == [False, True, False, True]


def on_one_rank(folder: str) -> None:
    """Only the primary has the weights in its cache; nobody has a network."""
    rank = int(os.environ["RANK"])
    constants.HF_HUB_CACHE = f"{folder}/cache{rank}"
    hub.answers = lambda *arguments: False
    dist.init_process_group("gloo")
    ranks = Ranks(rank, 2, rank, 2, torch.device("cpu"), 1)
    torch.manual_seed(rank)
    config = ModelSection(name=NAME, pretrained="if_available")
    model: Any = build_on_ranks(config, 7, False, ranks)
    torch.save([model.state_dict(), model.weights_at_start, model.weights_note], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_and_the_primary_alone_needs_the_hub(tmp_path: Path) -> None:
    published = {k: v + 1 for k, v in build(seed=5, num_classes=1000).state_dict().items()}
    fill_timm_cache(tmp_path / "cache0", published)
    result = run("tests.unit.train.test_hub", str(tmp_path), num_ranks=2)
    assert result.returncode == 0, result.stderr
    (first, *told), (second, *told_too) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert same(first, second) and same(first, published, head="fc.")
    assert told == told_too and told[0] == "pretrained"


def test_what_really_happened_is_on_record(
    prepared: tuple[Path, Manifest],
    tmp_path: Path,
    lookups: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from train.__main__ import main

    mlflow = MagicMock()
    mlflow.return_value.run_id = mlflow.return_value.reference = "1"
    monkeypatch.setattr("train.resuming.MlflowRun", mlflow)
    recipe = write_recipe(tmp_path, prepared[0])
    words = [
        *(str(recipe), f"run.folder={tmp_path}", "run.name=x", "model.pretrained=if_available"),
        *("tracking.mlflow=true", "schedule.phases=[{kind: constant, epochs: 1}]"),
    ]
    assert main(["check", *words]) == 0 and lookups == []  # a check needs no network
    assert main([*words, "budget.max_hours=1.0e-9"]) == 0
    assert "warning: random weights, since pretrained ones cannot be had" in capsys.readouterr().out
    assert len(lookups) == 1
    # The hub is there again, but the run goes on from its checkpoint.
    fill_timm_cache(Path(constants.HF_HUB_CACHE), build(num_classes=1000).state_dict())
    assert main(words) == 0
    assert len(lookups) == 1 and "weights of its checkpoint" in capsys.readouterr().out
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert summary["stopped_because"] == "finished" and summary["weights_at_start"] == "random"
    assert "does not answer" in summary["weights_note"]
    (tags,), _ = mlflow.return_value.set_tags.call_args
    assert tags["weights_at_start"] == "random" and tags["weights_note"] == summary["weights_note"]


def test_a_start_with_only_a_broken_checkpoint_gets_the_weights_it_asks_for(
    prepared: tuple[Path, Manifest],
    tmp_path: Path,
    lookups: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from train.__main__ import main

    fill_timm_cache(Path(constants.HF_HUB_CACHE), build(num_classes=1000).state_dict())
    (tmp_path / "x" / "checkpoints").mkdir(parents=True)
    (tmp_path / "x" / "checkpoints" / "step-00000002.pt").write_bytes(b"half of it")
    words = [str(write_recipe(tmp_path, prepared[0])), f"run.folder={tmp_path}", "run.name=x"]
    words += ["schedule.phases=[{kind: constant, epochs: 1}]", "budget.max_hours=1.0e-9"]
    assert main([*words, "model.pretrained=true"]) == 0
    said = capsys.readouterr().out
    assert said.count("step-00000002.pt is damaged") == 1 and "weights of its checkpoint" not in said
    summary = json.loads((tmp_path / "x" / "summary.json").read_text())
    assert summary["weights_at_start"] == "pretrained"


if __name__ == "__main__":
    on_one_rank(sys.argv[1])
