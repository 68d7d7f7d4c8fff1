"""Which deployments a command sees, and which are in another region."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.aws import AwsError
from infra.cloud import Cloud
from infra.commands import status
from infra.console import Console
from infra.deployment import StateFolder
from infra.errors import UserError
from tests.unit.infra.fake_cloud import FakeAws, deployment


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    """In us-east-1, without a bucket; `far` is known, and in eu-west-1."""
    states = StateFolder(tmp_path / ".infra")
    states.save(deployment(name="far", region="eu-west-1"))
    aws: Any = FakeAws(s3__head_bucket=AwsError("there is none", "404"))
    return Cloud(aws, "1", states, Console(), "")


def test_what_runs_in_another_region_is_never_taken_for_gone(cloud: Cloud) -> None:
    """Its groups are not to be seen from here: status would say `down`, and up make it a second time."""
    for look in (cloud.load, cloud.choose):
        with pytest.raises(UserError, match=r"far is in eu-west-1, .* pass --region eu-west-1"):
            look("far")
    assert cloud.names() == []
    with pytest.raises(UserError, match=r"no deployment in us-east-1: far is in eu-west-1 \(--region\)"):
        cloud.choose(None)
    cloud.states.save(deployment(name="near"))
    assert cloud.names() == ["near"] and cloud.choose(None).name == "near"


def test_status_names_what_it_does_not_look_at(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cloud, "open", lambda options, console: cloud)
    said = io.StringIO()
    with redirect_stdout(said):
        status.run(SimpleNamespace(name=None), cloud.console)  # type: ignore[arg-type]
    assert "far in eu-west-1, which may cost money" in said.getvalue()
    cloud.states.save(deployment(name="far", region="eu-west-1", stage="down"))
    said = io.StringIO()
    with redirect_stdout(said):
        status.run(SimpleNamespace(name=None), cloud.console)  # type: ignore[arg-type]
    assert "eu-west-1" not in said.getvalue()


def test_ones_own_variables_cannot_undo_what_up_promises(cloud: Cloud) -> None:
    """Four nodes where one was priced would cost four times the worst case."""
    file = cloud.states.root / "cluster.tfvars.json"
    file.write_text('{"root_gib": 500, "enable_efa": true}')
    assert cloud.own("cluster") == {"root_gib": 500, "enable_efa": True}
    file.write_text('{"num_nodes": 4}')
    with pytest.raises(UserError, match="sets num_nodes, which comes from --num-nodes: remove it there"):
        cloud.own("cluster")
