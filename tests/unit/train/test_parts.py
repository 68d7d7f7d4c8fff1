"""Small parts of the training: counting, choosing a rate, prices, metrics rows, the log's table."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.metrics import Predictions, topk_accuracy
from train.config import BudgetSection, ModelSection
from train.cost import find_price
from train.lr_finder import choose_learning_rate
from train.models.build import build_model, model_fault
from train.run_folder import is_finished, open_run_folder, write_status
from train.tracking.console import Console, duration
from train.tracking.metrics_file import MetricsFile, read_metrics
from train.tracking.training_log import refresh_table
from train.validation import count_topk


@pytest.mark.parametrize("k", [1, 5])
def test_topk_count_is_the_evaluations_own(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 9, generator=generator).bfloat16().float().mul(4).round()  # with many ties
    labels = torch.randint(0, 9, (400,), generator=generator)
    predictions = Predictions(logits.numpy(), labels.numpy(), np.arange(400), tuple(str(c) for c in range(9)))
    assert count_topk(logits, labels, k).item() == round(400 * topk_accuracy(predictions, k))


def test_nan_logits_score_zero_and_few_classes_have_a_top5() -> None:
    assert count_topk(torch.full((4, 3), float("nan")), torch.zeros(4, dtype=torch.long), 1).item() == 0
    assert count_topk(torch.randn(4, 3), torch.zeros(4, dtype=torch.long), 5).item() == 4


def curve(minimum: float, noise: float = 0.02, fall: float = 1.0) -> tuple[list[float], list[float]]:
    rates = np.geomspace(1e-4, 3, 60)
    shape = (np.log10(rates / minimum) / 2) ** 2
    losses = 2 - fall + fall * shape.clip(0, 1.2) + np.random.default_rng(0).normal(0, noise, 60)
    return rates.tolist(), losses.tolist()


def test_finder_chooses_at_the_minimum() -> None:
    choice, reason = choose_learning_rate(*curve(0.05), fraction_of_minimum=0.5)
    assert choice is not None and 0.015 < choice < 0.04 and "0.5 ×" in reason


@pytest.mark.parametrize(
    ("rates_losses", "sentence"),
    [
        (curve(0.05, noise=0.001, fall=0.01), "no clear minimum"),
        ((np.geomspace(1e-4, 1, 40).tolist(), np.linspace(1, 3, 40).tolist()), "no clear minimum"),
        (([1e-3] * 4, [1, 2, 3, 4]), "diverged after 4 steps"),
    ],
)
def test_finder_says_when_it_does_not_know(rates_losses, sentence: str) -> None:  # type: ignore[no-untyped-def]
    choice, reason = choose_learning_rate(*rates_losses, fraction_of_minimum=1.0)
    assert choice is None and sentence in reason


def test_prices_come_from_recipe_or_dated_file() -> None:
    listed = find_price(BudgetSection(instance_type="g6.12xlarge"))
    assert listed is not None and listed.cost_usd(1800) == pytest.approx(2.30) and "2025" in listed.source
    own = find_price(BudgetSection(usd_per_hour=1.5))
    assert own is not None and own.cost_usd(7200) == 3.0
    assert find_price(BudgetSection(instance_type=None)) is None
    with pytest.raises(ValueError, match=r"did you mean g6\.12xlarge"):
        find_price(BudgetSection(instance_type="g6.12xlarg"))


@pytest.mark.parametrize(
    ("library", "name", "near"), [("timm", "resnet81", "resnet"), ("torchvision", "resnet81", "resnet")]
)
def test_unknown_model_names_near_ones(library: str, name: str, near: str) -> None:
    fault = model_fault(ModelSection(library=library, name=name))
    assert fault is not None and near in fault.split("did you mean")[1]


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_models_have_the_wanted_classes(library: str) -> None:
    model = build_model(ModelSection(library=library, name="resnet18"), 7).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert next(model.parameters()).is_contiguous(memory_format=torch.channels_last)


def test_metrics_rows_leave_out_what_they_lack(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        file.append({"step": step, "loss": 0.123456789, "top1": None, "top5": float("nan")})
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {"step": 10, "loss": 0.123457}
    assert file.num_rows == 3
    file.cut_to(2)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 40, "lo')  # a crash
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]


def test_a_damaged_line_lets_no_row_in_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    said: list[str] = []
    file = MetricsFile(path, said.append)
    for step in range(6):
        file.append({"step": step})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"step": 1', *lines[2:]]) + "\n")
    file.cut_to(4)
    assert file.num_rows == 4 and "1 of 4 rows" in said[0]
    file.append({"step": 4})
    assert [row["step"] for row in read_metrics(path)] == [0, 2, 3, 4]


def test_console_is_plain_without_a_terminal_and_silent_on_other_ranks() -> None:
    stream = io.StringIO()
    console = Console(True, stream)
    console.progress("step 1")
    console.say("epoch 1")
    Console(False, stream).say("rank 1")
    assert stream.getvalue() == "epoch 1\n"
    assert (duration(75), duration(4000)) == ("1:15", "1:06:40")


def minimal_recipe(folder: Path, **changes: str):  # type: ignore[no-untyped-def]
    from train.config import Recipe

    tree = {"data": {"path": "data/x"}, "run": {"folder": str(folder)}}
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return Recipe.model_validate(tree)


def test_run_folder_goes_on_refuses_and_counts_up(tmp_path: Path) -> None:
    folder = open_run_folder(minimal_recipe(tmp_path), "demo")
    assert folder == tmp_path / "demo"
    # Nothing to go on with yet: any recipe may take it.
    assert open_run_folder(minimal_recipe(tmp_path, optimizer__peak_lr=0.2), "demo") == folder
    assert open_run_folder(minimal_recipe(tmp_path), "demo") == folder
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "manifest.json").write_text("{}")
    # Unfinished: taken up, also with another loader or path, but not with another rate.
    assert open_run_folder(minimal_recipe(tmp_path, data__loader="reference"), "demo") == folder
    with pytest.raises(ValueError, match=r"optimizer\.peak_lr: was 0\.1, now 0\.3"):
        open_run_folder(minimal_recipe(tmp_path, optimizer__peak_lr=0.3), "demo")
    write_status(folder, "finished", "")
    assert is_finished(folder)
    assert open_run_folder(minimal_recipe(tmp_path), "demo") == tmp_path / "demo-2"
    with pytest.raises(ValueError, match=r"run demo .* is finished"):
        open_run_folder(minimal_recipe(tmp_path, run__name="demo"), "demo")


def test_log_table_replaces_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "logs.md"
    path.write_text("# Log\n\nnote above\n")
    refresh_table(path, [("a|b",) * 14])
    path.write_text(path.read_text() + "\nnote below\n")
    refresh_table(path, [("c",) * 14, ("d",) * 14])
    text = path.read_text()
    assert text.count("| --- |") == 1 or text.count("\n| --- ") == 1
    assert "note above" in text and "note below" in text and "| d |" in text and "a\\|b" not in text
