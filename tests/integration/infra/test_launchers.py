"""The other ways onto machines: Slurm's script with stubs for Slurm, SkyPilot's YAML, the container image."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

SLURM = ROOT / "infra/slurm/train.sbatch"
SKY = ROOT / "infra/skypilot/train.yaml"
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
SCRIPTS = [SLURM, *(ROOT / "infra/bootstrap").glob("sprint-*[a-z]")]


def shellcheck() -> str:
    found = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("shellcheck is not installed")
    return found


def bash_scripts(tmp_path: Path) -> list[Path]:
    """Every bash of infra/, SkyPilot's as files."""
    scripts = [path for path in SCRIPTS if path.read_bytes().startswith(b"#!")]
    content = yaml.safe_load(SKY.read_text())
    for name in ("setup", "run"):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{content[name]}")
        scripts.append(tmp_path / name)
    return scripts


def test_all_bash_parses_and_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    scripts = bash_scripts(tmp_path)
    assert len(scripts) == 6
    for script in scripts:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
    said = subprocess.run([shellcheck(), "--severity=style", *scripts], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout


class Machine:
    """Stubs for Slurm and for the Python that it starts; what they play is in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "venv/bin").mkdir(parents=True)
        self.stub(
            "scontrol",
            'echo "scontrol $*" >>"$CALLS"\n'
            'case "$1 $2" in\n'
            '  "show hostnames") printf "node-a\\nnode-b\\n" ;;\n'
            '  "show job") echo "JobId=7 JobState=${STATE:-RUNNING} Reason=None" ;;\n'
            "esac\n",
        )
        # srun starts what it is given, as a step; here that is the stub of Python below.
        self.stub("srun", 'echo "srun $*" >>"$CALLS"; shift; exec "$@"\n')
        play = (
            'echo "python $*" >>"$CALLS"\n'
            'if [ "$3" = check ]; then exit "${CHECK:-0}"; fi\n'
            'if [ -n "${UNTIL_TERM:-}" ]; then\n'
            '  trap "got=1" TERM; touch started\n'
            '  while [ -z "${got:-}" ]; do sleep 0.05; done; sleep 0.3\n'
            "fi\n"
            "mkdir -p runs/mine\n"
            'if [ -n "${STATUS:-}" ]; then\n'
            '  printf \'{\\n "status": "%s",\\n "reason": "why"\\n}\\n\' "$STATUS" >runs/mine/status.json\n'
            "fi\n"
            'exit "${CODE:-0}"\n'
        )
        self.stub("../venv/bin/python", play)

    def stub(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{body}")
        path.chmod(0o755)

    def environment(self, **changes: str) -> dict[str, str]:
        return {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "CALLS": str(self.folder / "calls"),
            "VENV": str(self.folder / "venv"),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
        } | changes

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def run(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "calls").unlink(missing_ok=True)
        command = [SLURM, *(words or ("recipe.yaml", "run.name=mine"))]
        return subprocess.run(
            command, env=self.environment(**changes), capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def slurm(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


REQUEUED = "scontrol requeue 7"


def test_slurm_ends_a_finished_run_and_a_failed_one(slurm: Machine) -> None:
    done = slurm.run(STATUS="finished")
    assert done.returncode == 0 and REQUEUED not in slurm.calls()
    step = next(call for call in slurm.calls() if call.startswith("srun"))
    assert "--nnodes=2 --nproc-per-node=4" in step and "--rdzv-endpoint=node-a:29400" in step
    assert step.endswith("-m train recipe.yaml run.name=mine")
    failed = slurm.run(STATUS="failed", CODE="1")
    assert failed.returncode == 1 and "why" in failed.stderr and REQUEUED not in slurm.calls()


def test_slurm_requeues_a_run_that_wants_to_go_on(slurm: Machine) -> None:
    assert slurm.run(STATUS="restart").returncode == 0
    assert slurm.calls()[-1] == REQUEUED
    slurm.run(STATUS="restart", SLURM_RESTART_COUNT="50")
    assert REQUEUED not in slurm.calls(), "bounded"
    slurm.run(STATUS="restart", STATE="CANCELLED")
    assert REQUEUED not in slurm.calls(), "whoever cancels a job does not want it back"


def test_slurm_requeues_what_died_three_times_an_hour_at_most(slurm: Machine) -> None:
    codes = []
    for _ in range(3):
        codes.append(slurm.run(CODE="1").returncode)
    assert codes == [0, 0, 1] and REQUEUED not in slurm.calls()
    (slurm.folder / "runs/mine/deaths").write_text("1\n2\n")  # long ago
    assert slurm.run(CODE="1").returncode == 0 and REQUEUED in slurm.calls()


def test_slurm_does_not_act_on_the_status_of_an_earlier_start(slurm: Machine) -> None:
    slurm.run(STATUS="finished")
    assert slurm.run(CODE="1").returncode == 0 and REQUEUED in slurm.calls()


def test_slurm_waits_for_the_ranks_when_it_is_told_to_stop(slurm: Machine) -> None:
    process = subprocess.Popen(
        [SLURM, "recipe.yaml", "run.name=mine"],
        env=slurm.environment(STATUS="restart", UNTIL_TERM="1"),
        start_new_session=True,
    )
    while not (slurm.folder / "started").exists():
        assert process.poll() is None
    os.killpg(process.pid, 15)  # as a preemption does: the script and its steps
    assert process.wait(30) == 0
    assert slurm.calls()[-1] == REQUEUED


def test_slurm_refuses_what_could_not_go_on(slurm: Machine) -> None:
    nameless = slurm.run("recipe.yaml")
    assert nameless.returncode == 2 and "run.name" in nameless.stderr
    assert slurm.run(CHECK="1").returncode == 1
    assert not any(call.startswith("srun") for call in slurm.calls())
    options = re.findall(r"^#SBATCH (\S+)", SLURM.read_text(), re.MULTILINE)
    assert "--requeue" in options and "--signal=TERM@120" in options


@pytest.fixture
def sky() -> dict[str, Any]:
    return dict(yaml.safe_load(SKY.read_text()))


def test_skypilot_takes_the_task(sky: dict[str, Any]) -> None:
    assert sky["resources"]["use_spot"] and sky["resources"]["job_recovery"]["max_restarts_on_errors"] == 0
    known = {
        "name",
        "resources",
        "num_nodes",
        "workdir",
        "envs",
        "setup",
        "run",
        "file_mounts",
        "config",
        "secrets",
    }
    assert set(sky) <= known
    task = pytest.importorskip("sky", reason="SkyPilot is not installed").Task.from_yaml(str(SKY))
    assert task.num_nodes == 1


def test_skypilots_script_acts_on_the_status(sky: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "stubs").mkdir()
    machine = Machine(tmp_path / "stubs")
    shutil.copy(machine.folder / "venv/bin/python", tmp_path / ".venv/bin/python")
    machine.stub("sleep", ":\n")

    def run(**changes: str) -> tuple[int, list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        values = {name: str(value) for name, value in sky["envs"].items()}
        values |= {"BUCKET": "my-bucket", "DATA": "s3://my-bucket/data/x", "CALLS": str(tmp_path / "calls")}
        values |= {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "4", "SKYPILOT_NODE_RANK": "0"}
        values |= {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_TASK_ID": "task"} | changes
        path = {"PATH": f"{machine.bin}:/usr/bin:/bin"}
        done = subprocess.run(["bash", "-c", sky["run"]], cwd=tmp_path, env=values | path, timeout=60)
        return done.returncode, (tmp_path / "calls").read_text().splitlines()

    code, calls = run(STATUS="finished")
    assert code == 0 and len(calls) == 2 and "checkpoint.mirror=s3://my-bucket/runs" in calls[1]
    code, calls = run(STATUS="failed")
    assert code == 1 and len(calls) == 2, "nothing is tried again"
    code, calls = run(CODE="1")
    assert code == 1 and len(calls) == 1 + 3, "a check, and three starts that died"
    code, calls = run(STATUS="restart")
    assert code == 1 and len(calls) == 1 + 51, "restarts are bounded, too"
    assert run(CHECK="1")[0] == 1


def test_the_image_is_built_from_what_is_there() -> None:
    """No daemon is needed for this: what the Dockerfile copies exists, and it keeps to good practice."""
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    instructions = [shlex.split(line) for line in lines]
    (base,) = [words[1] for words in instructions if words[0] == "FROM"]
    assert ":" in base and not base.endswith(":latest")
    assert {words[0] for words in instructions} <= {
        "FROM",
        "SHELL",
        "ENV",
        "RUN",
        "WORKDIR",
        "COPY",
        "USER",
        "CMD",
    }
    allowed = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    for words in instructions:
        if words[0] == "COPY":
            for source in words[1:-1]:
                assert (ROOT / source).exists() and f"!{source}" in allowed, source
    installs = [line for line in lines if "apt-get install" in line]
    assert all("--no-install-recommends" in line and "rm -rf /var/lib/apt/lists" in line for line in installs)
    assert json.loads(next(line for line in lines if line.startswith("CMD")).removeprefix("CMD "))
