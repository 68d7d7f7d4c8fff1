"""What a sweep does without a training: spaces, memory, pruning, pages."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from optuna.trial import TrialState

from train.run_folder import write_status
from train.sweep import trial as trial_module
from train.sweep.__main__ import main
from train.sweep.page import sweep_table, write_page
from train.sweep.space import Space, overrides_of, parse_space, parse_words, value_text
from train.sweep.study import Definition, best_trial, ended_trials, next_trial, open_study, report
from train.sweep.trial import Outcome, StopRequest, TrialStart, ValidationRows, run_trial, training_command

RECIPE = "data: {path: nowhere, resolution: 32}\nmodel: {name: resnet18}\n"


def space(word: str) -> Space:
    key, _, text = word.partition("=")
    found = parse_space(key, text)
    assert found is not None
    return found


def test_all_kinds_of_spaces() -> None:
    assert space("a.b=log:0.01..1") == Space("a.b", "log:0.01..1", "float", 0.01, 1, None, True)
    assert space("a.b=-1..1e-1") == Space("a.b", "-1..1e-1", "float", -1, 0.1)
    assert space("a.b=0..0.5:0.1") == Space("a.b", "0..0.5:0.1", "float", 0, 0.5, 0.1)
    assert space("a.b=.1..1:0.4").high == pytest.approx(0.9)  # the last point of the grid
    assert space("a.b=int:0..9") == Space("a.b", "int:0..9", "int", 0, 9)
    assert space("a.b=int:16..50:8").high == 48
    assert space("a.b=sgd|adamw").choices == ("sgd", "adamw")
    assert space("a.b={0: 128, 4: 160}|[1|2]|'x|y'|null").choices == (
        "{0: 128, 4: 160}",
        "[1|2]",
        "'x|y'",
        "null",
    )


@pytest.mark.parametrize("text", ["../shared/data", "0.1", "'1..2'", "sgd", "s3://bucket/x", "[0.1, 1]", ""])
def test_other_values_are_fixed(text: str) -> None:
    words = parse_words([f"data.path={text}"])
    assert words.fixed == [f"data.path={text}"] and not words.spaces and not words.faults


def test_every_fault_has_a_sentence_and_all_come_at_once() -> None:
    faulty = {
        "a=1..0": "must begin below its end",
        "b=log:0..1": "must begin above 0",
        "c=log:0.1..1:0.1": "cannot have a step",
        "d=0.1..x": "no range of numbers",
        "e=int:0.5..2": "no range of whole numbers",
        "f=0..1:0": "the step of '0..1:0' must lie above 0",
        "g=0..1:2": "fit into the range",
        "h=x||y": "empty choice",
        "i=x|x": "names a choice twice",
        "k=log:5": "no range of numbers",
        "l=0..inf": "finite",
        "m": "not of the form",
        "run.name=x": "the sweep names its trials",
    }
    words = parse_words([*faulty, "a=1..2", "o=1|[}"])
    assert not words.spaces and not words.fixed
    assert len(words.faults) == len(faulty) + 2
    for fault, expected in zip(words.faults, [*faulty.values(), "given twice", "no valid YAML"], strict=True):
        assert expected in fault


def test_values_come_back_from_yaml_as_they_are() -> None:
    import yaml

    for value in (1e-5, 0.0346123, 3e20, 0.30000000000000004, 7, 0.5):
        assert yaml.safe_load(value_text(value)) == pytest.approx(value, rel=1e-5)
        assert isinstance(yaml.safe_load(value_text(value)), int | float)
    assert overrides_of({"a": 0.1 + 0.2, "b": "null"}) == ["a=0.3", "b=null"]


def test_command_line_names_all_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    words = ["optimizer.peaklr=1..2", "model.dropout=0.5..2", "run.seed=int:2..1", "optimizer.name=sgd|3"]
    assert main([str(recipe), "--trials", "0", "--name", "a/b", *words]) == 1
    said = capsys.readouterr().err
    for expected in (
        "--trials must be at least 1",
        "--name 'a/b' must be",
        "optimizer.peaklr: unknown key; did you mean peak_lr?",
        "model.dropout: should be less than 1 (given: 2)",
        "run.seed: 'int:2..1' must begin below",
        "optimizer.name: should be a valid string (given: 3)",
    ):
        assert expected in said
    assert "Traceback" not in said and said.count("error: ") == 6
    assert main([str(tmp_path / "none.yaml"), "--trials", "1", "run.seed=int:0..9"]) == 1
    assert "none.yaml: there is no such file" in capsys.readouterr().err
    assert main([str(recipe), "--trials", "1"]) == 1
    assert "nothing to search" in capsys.readouterr().err


def test_a_member_of_a_default_list_can_be_searched(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    from train.sweep.__main__ import _load

    assert _load(recipe, parse_words(["data.crop_scale.0=0.1..0.5"]))[1] == []
    assert "crop_scale must be" in _load(recipe, parse_words(["data.crop_scale.0=0.1..2"]))[1][0]


def definition(*words: str, metric: str = "top1", seed: int = 0) -> Definition:
    return Definition(tuple(space(word) for word in words), metric, seed)  # type: ignore[arg-type]


SPACES = ("optimizer.peak_lr=log:0.01..1", "model.dropout=0..0.5:0.1", "optimizer.name=sgd|adamw")


def run_fake(folder: Path, num_trials: int, interrupted: bool = False) -> list[dict]:
    """Trials with a made-up objective; the values that were chosen."""
    defined = definition(*SPACES)
    study = open_study(folder, defined, num_epochs=6, pruning=True)
    while len(ended_trials(study)) < num_trials:
        trial = next_trial(study, defined)
        study.tell(trial, trial.params["optimizer.peak_lr"])
    if interrupted:
        next_trial(study, defined)  # and the process dies
    return [trial.params for trial in study.get_trials()]


def test_an_interrupted_sweep_chooses_what_a_calm_one_does(tmp_path: Path) -> None:
    for name in ("calm", "torn"):
        (tmp_path / name).mkdir()
    calm = run_fake(tmp_path / "calm", 14)
    for num_trials in (1, 4, 12):
        run_fake(tmp_path / "torn", num_trials, interrupted=True)
    torn = run_fake(tmp_path / "torn", 14)
    assert calm == torn and len({json.dumps(params) for params in calm}) == 14


def test_another_definition_is_refused_with_its_differences(tmp_path: Path) -> None:
    open_study(tmp_path, definition(*SPACES), 3, True)
    other = definition("optimizer.peak_lr=log:0.1..1", *SPACES[1:], metric="loss")
    with pytest.raises(ValueError, match=r"--metric: was top1, now loss; optimizer.peak_lr: was log:0.01..1"):
        open_study(tmp_path, other, 3, True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.db").write_bytes(b"no database, but long enough to be read as one" * 50)
    with pytest.raises(ValueError, match="cannot be read"):
        open_study(tmp_path / "broken", definition(*SPACES), 3, True)


def test_pruning_compares_equal_epochs_of_enough_trials(tmp_path: Path) -> None:
    defined = definition(*SPACES)
    study = open_study(tmp_path, defined, num_epochs=9, pruning=True)
    for number in range(5):
        trial = next_trial(study, defined)
        # Values grow with the epochs; the first five are never pruned, however bad.
        assert not any(report(study, trial, epoch, 0.1 * epoch + 0.001 * number) for epoch in range(1, 10))
        study.tell(trial, 0.9 + 0.001 * number)
    trial = next_trial(study, defined)
    assert not report(study, trial, 1, 0.0)  # before a third of the epochs
    assert not report(study, trial, 3, 0.31)  # good for epoch 3, though worse than all at their end
    assert report(study, trial, 4, 0.35)
    study.tell(trial, state=TrialState.PRUNED)
    best = best_trial(study)
    assert best is not None and best.number == 4
    calm = open_study(tmp_path, defined, num_epochs=9, pruning=False)
    assert not report(calm, next_trial(calm, defined), 4, 0.0)


def test_a_loss_is_minimized(tmp_path: Path) -> None:
    defined = definition(*SPACES, metric="loss")
    study = open_study(tmp_path, defined, 3, True)
    for loss in (0.9, 0.3, 0.6):
        study.tell(next_trial(study, defined), loss)
    best = best_trial(study)
    assert best is not None and best.value == 0.3


def test_page_of_all_kinds_of_trials(tmp_path: Path) -> None:
    defined = definition(*SPACES)
    study = open_study(tmp_path, defined, 3, True)
    write_page(tmp_path, study, defined, 9, 1)
    assert "No trial has trained to its end yet" in (tmp_path / "sweep.html").read_text()
    for number in range(8):
        trial = next_trial(study, defined)
        if number == 3:
            trial.set_user_attr("reason", "the <loss> became non-finite")
            study.tell(trial, state=TrialState.FAIL)
        elif number == 5:
            report(study, trial, 1, 0.2)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, 0.5 + number / 100)
    write_page(tmp_path, study, defined, 9, 2)
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("data:image/png;base64") == 5  # history, importance, three parameters
    assert "the &lt;loss&gt; became non-finite" in page and "1 failed, 1 pruned, 1 to come" in page
    assert "from 6 trials that trained to their end (not the pruned ones). That is few" in page
    assert "57.00%" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing from outside
    table = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["state"] for row in table["trials"]].count("complete") == 6
    assert table["best"]["number"] == 8 and table["best"]["value"] == pytest.approx(0.57)
    assert table["best"]["command"].startswith("torchrun --standalone --nproc-per-node=2 -m train ")
    assert f"optimizer.peak_lr={value_text(table['best']['parameters']['optimizer.peak_lr'])}" in page
    assert sum(sweep_table(tmp_path, study, defined, 9, 1)["importance"].values()) == pytest.approx(1)


def test_rows_are_read_as_they_come_and_again_from_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = ValidationRows(path, "top1")
    assert rows.read_new() == []
    path.write_text('{"split": "train", "epoch": 0.5, "top1": 0.1}\n{"split": "val", "epoch": 1.0, "top1"')
    assert rows.read_new() == []
    with path.open("a") as file:
        file.write(': 0.2}\n{"split": "val:large", "epoch": 1.0, "top1": 0.9}\n')
    assert rows.read_new() == [(1, 0.2)] and rows.read_new() == []
    (tmp_path / "new").write_text('{"split": "val", "epoch": 1.0, "top1": 0.2}\n')
    (tmp_path / "new").replace(path)
    assert rows.read_new() == [(1, 0.2)]


# A training in small: writes a row every 0.1 s; on SIGTERM leaves word and goes.
FAKE = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
def leave(number, frame):
    (folder / "status.json").write_text(json.dumps({"status": "restart", "reason": "SIGTERM"})); sys.exit(0)
signal.signal(signal.SIGTERM, leave)
for epoch in range(1, 500):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"split": "val", "epoch": epoch, "top1": epoch / 1000}) + "\\n")
    time.sleep(0.1)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrialStart:
    monkeypatch.setattr(
        TrialStart, "command", property(lambda self: [sys.executable, "-c", FAKE, str(self.folder)])
    )
    return TrialStart(tmp_path / "recipe.yaml", tmp_path / "trial-0001", [], tmp_path / "trial-0001.log")


def test_a_trial_is_pruned_and_leaves_in_good_order(start: TrialStart) -> None:
    seen: list[int] = []

    def should_prune(epoch: int, value: float) -> bool:
        seen.append(epoch)
        return epoch == 3

    outcome = run_trial(start, "top1", should_prune, StopRequest())
    assert outcome.state == "pruned" and outcome.value is not None and 0.003 <= outcome.value < 0.05
    assert seen[:3] == [1, 2, 3] and seen == sorted(set(seen))


def test_a_trial_is_stopped_with_the_sweep(start: TrialStart) -> None:
    stop = StopRequest()

    def press_ctrl_c(epoch: int, value: float) -> bool:
        if stop.signal is None:
            stop._on_signal(signal.SIGINT, None)
        return False

    assert run_trial(start, "top1", press_ctrl_c, stop) == Outcome(
        "stopped", pytest.approx(0.003, abs=0.003), "SIGTERM"
    )


def test_ctrl_c_twice_does_not_wait(start: TrialStart) -> None:
    stop = StopRequest()

    def press_twice(epoch: int, value: float) -> bool:
        for _ in range(2):
            stop._on_signal(signal.SIGINT, None)
        return False

    assert run_trial(start, "top1", press_twice, stop).state == "stopped"
    assert not (start.folder / "status.json").exists()


def test_a_trial_that_does_not_leave_is_killed(start: TrialStart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "STOP_SECONDS", 0.5)
    deaf = FAKE.replace(
        "signal.signal(signal.SIGTERM, leave)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    )
    assert deaf != FAKE
    monkeypatch.setattr(
        TrialStart, "command", property(lambda self: [sys.executable, "-c", deaf, str(self.folder)])
    )
    assert run_trial(start, "top1", lambda epoch, value: epoch == 2, StopRequest()).state == "pruned"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import sys; print('error (rank 0): no such data'); sys.exit(1)", "no such data"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL (out of memory?)"),
    ],
)
def test_a_failed_trial_has_a_reason(
    start: TrialStart, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr(TrialStart, "command", property(lambda self: [sys.executable, "-c", script]))
    outcome = run_trial(start, "top1", lambda epoch, value: False, StopRequest())
    assert outcome.state == "failed" and reason in outcome.reason


def test_a_training_that_had_finished_is_not_started_again(start: TrialStart) -> None:
    start.folder.mkdir()
    write_status(start.folder, "finished", "3 epochs")
    (start.folder / "summary.json").write_text('{"final_top1": 0.75}')
    assert run_trial(start, "top1", lambda epoch, value: False, StopRequest()) == Outcome("complete", 0.75)
    assert not start.log.exists()


def test_ranks_are_started_by_torchrun() -> None:
    assert training_command(["recipe.yaml"], 1)[1:] == ["-m", "train", "recipe.yaml"]
    assert training_command(["recipe.yaml"], 4)[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"),
        *("-m", "train", "recipe.yaml"),
    ]
