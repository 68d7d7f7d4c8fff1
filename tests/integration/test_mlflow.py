"""MLflow may die: a real `mlflow server` on SQLite and on PostgreSQL, behind a proxy that lets it fail."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from data_prep.manifest import Manifest
from tests.integration.launch import run, start, write_recipe
from tests.integration.mlflow_server import (
    BREAK,
    HANG,
    LOSE,
    PASS,
    REFUSE,
    MlflowServer,
    Proxy,
    mlflow_server,
    postgres,
    postgres_binaries,
    proxy_before,
)
from train.config import RecipeError, TrackingSection, dump_recipe, load_recipe
from train.run_folder import write_status
from train.tracking import mlflow_client, mlflow_replay, mlflow_run, sync
from train.tracking.metrics_file import MetricsFile, read_metrics
from train.tracking.mlflow_client import open_client
from train.tracking.mlflow_rows import as_row
from train.tracking.mlflow_run import MlflowRun

PASSWORD = "corr3ct-horse"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(f"sqlite:///{folder / 'mlflow.db'}", folder) as running:
        yield running


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[Proxy]:
    with proxy_before(server.port) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same waits, shorter."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(mlflow_run, "FIRST_BACKOFF_SECONDS", 0.05)
    monkeypatch.setattr(mlflow_run, "MAX_BACKOFF_SECONDS", 0.5)
    monkeypatch.setattr(mlflow_run, "PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(mlflow_run, "LAST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(sync, "WAITS_SECONDS", (0.05, 0.1))


class Training:
    """Rows as a training writes them, without one."""

    def __init__(
        self, folder: Path, uri: str, experiment: str = "rows", reference: str | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.metrics = MetricsFile(folder / "metrics.jsonl")
        self.said: list[str] = []
        config = TrackingSection().model_copy(update={"uri": uri, "experiment": experiment})
        self.mlflow = MlflowRun(config, folder, reference, self.said.append)

    def train(self, first: int, last: int, seconds_a_row: float = 0.0) -> None:
        for step in range(first, last):
            for split in ("train", "val", "val:small") if step % 10 == 0 else ("train",):
                loss = float("nan") if step == 7 else 1 / (step + 1)
                row = {"step": step, "epoch": step / 10, "split": split, "loss": loss, "top1": step / 1000}
                self.metrics.append(row | {"top5": 0.5, "learning_rate": 0.1, "time": time.time()})
                self.mlflow.poke()
            time.sleep(seconds_a_row)

    def wait(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.said, self.mlflow.failed)
            time.sleep(0.02)


def assert_all_rows(uri: str, run_id: str | None, folder: Path) -> None:
    """Each row of the file is there once, with its own time, and the server's order is the file's."""
    client = open_client(uri)
    expected: dict[str, list[tuple[int, int, float]]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        row = as_row(line)
        assert row is not None
        for name, value in row.metrics.items():
            expected.setdefault(name, []).append((row.step, row.timestamp, value))
    for name, wanted in expected.items():
        history = client.get_metric_history(run_id or "", name)
        # A store keeps one of what is equal in all, as the epoch of train and val in the same millisecond.
        there = [(m.step, m.timestamp, pytest.approx(m.value)) for m in history]
        assert there == list(dict.fromkeys(wanted)), name


def runs_of(uri: str, experiment: str) -> list[Any]:
    client = open_client(uri)
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


@pytest.mark.long
def test_rows_survive_every_kind_of_fault(server: MlflowServer, proxy: Proxy, tmp_path: Path) -> None:
    draw = random.Random(3)
    faults = Counter[str]()
    coming = [LOSE, REFUSE, LOSE, BREAK, LOSE, HANG, LOSE, BREAK, LOSE, REFUSE, LOSE]

    def fault(method: str, path: str) -> str:
        # The server often does its work in between: what it has must be found again.
        chosen = coming.pop() if coming and draw.random() < 0.25 else PASS
        faults[chosen] += "log-batch" in path
        return chosen

    proxy.always(REFUSE)  # down at the start
    training = Training(tmp_path / "stormy", proxy.uri, "storm")
    training.mlflow.log_parameters({"model.name": "test", "optimizer": {"lr": 0.1}})
    training.mlflow.set_tags({"dataset": "noise"})
    training.mlflow.log_metrics({"peak_lr": 0.25}, 0)
    training.wait(lambda: training.mlflow.failed)
    proxy.fault = fault
    last = 0
    while coming or last < 300:
        training.train(last, last + 20, seconds_a_row=0.005)
        last += 20
        assert last < 20_000, training.said
    training.mlflow.log_metrics({"final_top1": 0.75}, last)
    training.mlflow.log_file(training.folder / "metrics.jsonl")
    assert training.mlflow.finish("FINISHED"), training.said
    assert faults[LOSE], faults  # rows that the server had, and we did not know
    assert_all_rows(server.uri, training.mlflow.run_id, training.folder)
    runs = runs_of(server.uri, "storm")
    assert [r.info.run_id for r in runs] == [training.mlflow.run_id]
    assert runs[0].info.status == "FINISHED" and runs[0].info.run_name == "stormy"
    assert runs[0].data.params == {"model.name": "test", "optimizer": "{'lr': 0.1}"}
    assert runs[0].data.tags["dataset"] == "noise" and runs[0].data.metrics["final_top1"] == 0.75
    history = open_client(server.uri).get_metric_history(training.mlflow.run_id or "", "peak_lr")
    assert [(m.step, m.value) for m in history] == [(0, 0.25)]
    artifacts = open_client(server.uri).list_artifacts(training.mlflow.run_id or "")
    assert [artifact.path for artifact in artifacts] == ["metrics.jsonl"]
    failed = [line for line in training.said if "failed" in line]
    back = [line for line in training.said if line.startswith("MLflow is back: ")]
    assert 1 <= len(failed) == len(back) and "Traceback" not in "".join(training.said)


def test_a_lost_answer_to_the_creation_makes_no_second_run(
    server: MlflowServer, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.once(LOSE, "runs/create")
    training = Training(tmp_path / "once", proxy.uri, "creation")
    training.train(0, 5)
    assert training.mlflow.finish("FINISHED"), training.said
    assert proxy.count("runs/create", LOSE) == 1 and proxy.count("runs/create") == 0
    assert [run.info.run_id for run in runs_of(server.uri, "creation")] == [training.mlflow.run_id]


def test_a_creation_that_was_given_up_and_done_after_all_is_undone(
    server: MlflowServer, proxy: Proxy, tmp_path: Path
) -> None:
    training = Training(tmp_path / "twin", proxy.uri, "twins")
    training.train(0, 3)
    assert training.mlflow.wait_until_open()
    client = open_client(server.uri)
    found = client.get_experiment_by_name("twins")
    assert found is not None
    key = json.loads((training.folder / "mlflow.json").read_text())["key"]
    client.create_run(found.experiment_id, tags={mlflow_replay.KEY_TAG: key})
    assert training.mlflow.finish("FINISHED"), training.said
    assert [run.info.run_id for run in runs_of(server.uri, "twins")] == [training.mlflow.run_id]


def test_nothing_waits_for_a_hanging_server(proxy: Proxy, tmp_path: Path) -> None:
    proxy.always(HANG)
    training = Training(tmp_path / "hung", proxy.uri)
    done = threading.Event()

    def work() -> None:
        training.mlflow.log_parameters({"a": 1})
        training.train(0, 500)
        training.mlflow.finish("KILLED", timeout_seconds=0.5)
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(30)  # one request alone hangs for ever
    assert "python -m train sync" in training.said[-1] and str(training.folder) in training.said[-1]
    proxy.released.set()


def test_sync_sends_what_was_missed_and_nothing_twice(
    server: MlflowServer, proxy: Proxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(tmp_path / "missed", proxy.uri, "sync")
    training.train(0, 20)
    training.wait(lambda: proxy.count("log-batch"))
    proxy.always(BREAK)
    training.train(20, 40)
    training.mlflow.log_metrics({"final_top1": 0.5}, 40)
    assert not training.mlflow.finish("FINISHED")
    (training.folder / "summary.json").write_text('{"mlflow_run_id": null}')
    assert sync.main([str(training.folder)]) == 1
    assert "failed" in capsys.readouterr().err
    proxy.always(PASS)
    assert sync.main([str(training.folder)]) == 0
    said = capsys.readouterr().out
    assert "1 figures" in said and "is FINISHED" in said and " 0 rows" not in said
    assert_all_rows(server.uri, training.mlflow.run_id, training.folder)
    [run] = runs_of(server.uri, "sync")
    assert run.info.status == "FINISHED" and run.data.metrics["final_top1"] == 0.5
    assert run.info.run_id in (training.folder / "summary.json").read_text()
    assert sync.main([str(training.folder)]) == 0
    assert "sent 0 rows, 0 parameters, 0 tags, 0 figures, 0 files" in capsys.readouterr().out
    assert_all_rows(server.uri, training.mlflow.run_id, training.folder)


def test_a_run_without_mlflow_is_synced_from_its_folder(
    server: MlflowServer, prepared: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "untracked"
    folder.mkdir(parents=True)
    recipe = load_recipe(write_recipe(tmp_path, prepared[0]))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    metrics = MetricsFile(folder / "metrics.jsonl")
    for step in range(10):
        metrics.append({"step": step, "split": "train", "loss": 1.0, "top1": 0.5, "time": 1.7e9 + step})
    (folder / "summary.json").write_text('{"final_top1": 0.5, "mlflow_run_id": null}')
    write_status(folder, "finished", "1 of 1 epochs")
    assert sync.main([str(folder), "--uri", server.uri]) == 0
    said = capsys.readouterr().out
    assert sync.main([str(folder), "--uri", server.uri]) == 0
    assert "sent 0 rows" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["mlflow_run_id"] in said and "sent 10 rows" in said
    assert_all_rows(server.uri, summary["mlflow_run_id"], folder)
    logged = open_client(server.uri).get_run(summary["mlflow_run_id"])
    assert logged.data.params["model.name"] == "test_resnet" and logged.info.status == "FINISHED"
    assert logged.data.metrics["final_top1"] == 0.5 and logged.info.start_time == 1_700_000_000_000
    assert sync.main([str(tmp_path)]) == 1


def test_dead_runs_are_marked_and_living_ones_take_it_back(
    server: MlflowServer, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_replay, "HEARTBEAT_SECONDS", 0.3)
    monkeypatch.setattr(mlflow_run, "HEARTBEAT_SECONDS", 0.3)
    client = open_client(server.uri)
    experiment_id = client.create_experiment("dead")
    long_ago, lately = str(int(time.time()) - 1000), str(int(time.time()) - 100)
    dead = client.create_run(experiment_id, run_name="dead", tags={"heartbeat": long_ago}).info.run_id
    lives = client.create_run(experiment_id, run_name="lives", tags={"heartbeat": lately}).info.run_id
    alien = client.create_run(experiment_id, run_name="alien").info.run_id
    training = Training(tmp_path / "observer", proxy.uri, "dead")
    training.wait(lambda: client.get_run(dead).info.status == "FAILED")
    assert client.get_run(dead).data.tags["died"] == mlflow_client.utc(int(long_ago))
    assert {client.get_run(other).info.status for other in (lives, alien)} == {"RUNNING"}
    training.wait(lambda: any("dead died" in line for line in training.said))
    run_id = training.mlflow.run_id or ""
    client.set_tag(run_id, "died", "mistaken for dead")
    client.set_terminated(run_id, "FAILED")
    training.wait(lambda: client.get_run(run_id).info.status == "RUNNING")
    training.wait(lambda: "died" not in client.get_run(run_id).data.tags)
    assert training.mlflow.finish("FINISHED")


def test_a_lost_database_gets_everything_again(server: MlflowServer, proxy: Proxy, tmp_path: Path) -> None:
    training = Training(tmp_path / "moved", proxy.uri, "before")
    training.train(0, 10)
    training.mlflow.log_metrics({"peak_lr": 0.5}, 0)
    assert training.mlflow.finish("KILLED")
    path = training.folder / "mlflow.json"
    former = json.loads(path.read_text())
    path.write_text(json.dumps(former | {"run_id": "0" * 32, "key": "1" * 32}))
    again = Training(training.folder, proxy.uri, "before")
    again.train(10, 20)
    assert again.mlflow.finish("FINISHED")
    assert again.mlflow.run_id != training.mlflow.run_id and "has no run 0000" in again.said[0]
    assert_all_rows(server.uri, again.mlflow.run_id, training.folder)
    assert open_client(server.uri).get_run(again.mlflow.run_id or "").data.metrics["peak_lr"] == 0.5


def test_what_the_server_will_never_take_is_left_out(
    server: MlflowServer, proxy: Proxy, tmp_path: Path
) -> None:
    training = Training(tmp_path / "refused", proxy.uri, "refused")
    training.mlflow.log_parameters({"good": 1, "bad?*": 2})
    training.train(0, 3)
    assert training.mlflow.finish("FINISHED"), training.said
    assert len(training.said) == 1 and "refuses the parameter bad?*" in training.said[0]
    assert_all_rows(server.uri, training.mlflow.run_id, training.folder)
    [logged] = runs_of(server.uri, "refused")
    assert logged.data.params == {"good": "1"}
    open_client(server.uri).delete_run(logged.info.run_id)
    again = Training(training.folder, proxy.uri, "refused")
    again.train(3, 5)
    assert not again.mlflow.finish("FINISHED") and "was deleted in MLflow" in again.said[0]


def test_a_checkpoint_alone_finds_the_run_again(server: MlflowServer, proxy: Proxy, tmp_path: Path) -> None:
    proxy.once(LOSE, "runs/create")
    training = Training(tmp_path / "first" / "same", proxy.uri, "moving")
    key = training.mlflow.reference  # of a checkpoint that was saved before the server had answered
    training.train(0, 5)
    assert training.mlflow.finish("KILLED")
    for number, reference in enumerate((key, training.mlflow.reference)):
        moved = Training(tmp_path / f"machine-{number}" / "same", proxy.uri, "moving", reference)
        moved.train(5, 8)
        assert moved.mlflow.finish("FINISHED") and moved.mlflow.run_id == training.mlflow.run_id
    history = open_client(server.uri).get_metric_history(training.mlflow.run_id or "", "train_top1")
    assert [metric.step for metric in history] == list(range(8))


def test_passwords_are_never_said(
    server: MlflowServer, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    secret = proxy.uri.replace("http://", f"http://me:{PASSWORD}@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    folder = tmp_path / "secret"
    folder.mkdir()
    said: list[str] = []
    for fault in (REFUSE, BREAK, LOSE, PASS):
        proxy.always(fault)
        tracked = MlflowRun(TrackingSection(experiment="secret"), folder, None, said.append)
        tracked.log_parameters({"uri": secret, "plain": 1})
        tracked.set_tags({"command": f"--uri {secret}"})
        tracked.finish("FINISHED", timeout_seconds=20)
        sync.main([str(folder)])
    assert len(said) >= 3
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    [logged] = runs_of(server.uri, "secret")
    assert logged.info.status == "FINISHED" and logged.data.params["plain"] == "1"
    everything = [*said, *capfd.readouterr(), str(logged.to_dictionary())]
    everything += [path.read_text() for path in folder.iterdir()]
    assert not [text for text in everything if PASSWORD in text]
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_USERNAME") as refused:
        load_recipe(write_recipe(tmp_path, tmp_path), [f"tracking.uri={secret}", f"modle.name={secret}"])
    assert PASSWORD not in str(refused.value)


def test_training_killed_and_resumed_is_one_run(
    server: MlflowServer, proxy: Proxy, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    changes = {
        "mlflow: false": f"uri: '{proxy.uri}'",
        "global_batch_size: 24": "global_batch_size: 4",
        "every_steps: 2": "every_steps: 1",
        ", {kind: plateau, epochs: 1, initial_lr_fraction: 0.05}": "",
    }
    recipe = write_recipe(tmp_path, prepared[0], **changes)
    words = ("train", str(recipe), f"run.folder={tmp_path}")
    proxy.always(REFUSE)
    process = start(*words, num_ranks=2)
    folder, deadline = tmp_path / "tiny", time.monotonic() + 120

    def step() -> int:
        path = folder / "metrics.jsonl"
        return max((row["step"] for row in read_metrics(path)), default=0) if path.is_file() else 0

    while step() < 45:  # in the second epoch, its first one saved
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        if step() >= 5:
            proxy.always(PASS)
        time.sleep(0.02)
    while not proxy.count("log-batch"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    proxy.once(HANG, "runs/get")
    again = run(*words, num_ranks=2)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stdout + again.stderr
    run_id = json.loads((folder / "summary.json").read_text())["mlflow_run_id"]
    logged = [r for r in runs_of(server.uri, "imagenet-sprint") if r.info.run_name == "tiny"]
    ids = [r.info.run_id for r in logged if r.data.tags.get("run_folder") == str(folder)]
    assert ids == [run_id]
    history = open_client(server.uri).get_metric_history(run_id, "train_top1")
    assert [metric.step for metric in history] == list(range(1, 81))
    history = open_client(server.uri).get_metric_history(run_id, "val_top1")
    assert [metric.step for metric in history] == [40, 80]
    assert open_client(server.uri).get_run(run_id).info.status == "FINISHED"


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    children = [
        int(child)
        for tasks in Path(f"/proc/{pid}/task").glob("*/children")
        for child in tasks.read_text().split()
    ]
    return [pid, *(member for child in children for member in family(child))]


def kill_and_restart(server: MlflowServer, folder: Path) -> None:
    """Rows before, while it is dead, and after; the server is really killed."""
    training = Training(folder, server.uri, "killed")
    training.train(0, 50)
    assert training.mlflow.wait_until_open(), training.said
    training.train(50, 100)
    server.kill()
    training.train(100, 150)
    training.wait(lambda: training.mlflow.failed)
    server.start()
    training.train(150, 200)
    assert training.mlflow.finish("FINISHED"), training.said
    assert_all_rows(server.uri, training.mlflow.run_id, folder)
    [logged] = [run for run in runs_of(server.uri, "killed") if run.info.run_name == folder.name]
    assert logged.info.status == "FINISHED"


@pytest.mark.long
def test_server_killed_in_the_middle(server: MlflowServer, tmp_path: Path) -> None:
    kill_and_restart(server, tmp_path / "on-sqlite")


needs_postgres = pytest.mark.skipif(postgres_binaries() is None, reason="PostgreSQL is not installed")


@needs_postgres
def test_postgres_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pytest.importorskip("psycopg2")
    with postgres(PASSWORD) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        folder = tmp_path / "run"
        training = Training(folder, uri, "direct")
        training.train(0, 40)
        training.mlflow.log_parameters({"uri": uri})
        assert training.mlflow.finish("KILLED"), training.said
        again = Training(folder, uri, "direct")
        again.metrics.cut_to(39)  # up to step 30, of which each tenth has three
        again.train(31, 60)
        assert again.mlflow.finish("FINISHED"), again.said
        client = open_client(uri)
        history = client.get_metric_history(training.mlflow.run_id or "", "train_top1")
        assert [metric.step for metric in history] == list(range(60))
        [logged] = runs_of(uri, "direct")
        assert logged.info.status == "FINISHED" and logged.info.run_id == again.mlflow.run_id
        everything = [str(logged.to_dictionary()), (folder / "mlflow.json").read_text(), *capfd.readouterr()]
        assert not [text for text in everything if PASSWORD in text]
        assert uri.replace(f":{PASSWORD}", "") in everything[1]


@pytest.mark.long
@needs_postgres
def test_server_on_postgres(tmp_path: Path) -> None:
    pytest.importorskip("psycopg2")
    with (
        postgres(PASSWORD) as uri,
        mlflow_server(uri, tmp_path) as server,
        proxy_before(server.port) as proxy,
    ):
        (tmp_path / "storm").mkdir()
        test_rows_survive_every_kind_of_fault(server, proxy, tmp_path / "storm")
        kill_and_restart(server, tmp_path / "killed")


def test_without_the_package_only_a_line_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    training = Training(tmp_path / "bare", "http://127.0.0.1:9")
    training.train(0, 3)
    assert training.mlflow.wait_until_open() is None
    assert not training.mlflow.finish("FINISHED")
    assert "pip install mlflow" in training.said[0] and len(training.said) == 2
