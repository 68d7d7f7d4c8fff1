"""The project's tar: the same bytes for the same files, and nothing that is not to leave."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from infra.code import NEEDED, pack_code
from infra.errors import UserError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name in NEEDED:
        path = root / name / "__init__.py" if "." not in name else root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    (root / "scripts").mkdir()
    (root / "scripts" / "setup.sh").write_text("#!/bin/sh\n")
    (root / "scripts" / "setup.sh").chmod(0o755)
    (root / "tests").mkdir()
    (root / "tests" / "big.py").write_text("x" * 1000)
    (root / ".gitignore").write_text("/runs/\n*.key\n")
    (root / "runs").mkdir()
    (root / "runs" / "secret.txt").write_text("not to leave")
    (root / "aws.key").write_text("not to leave")
    return root


def names_in(packed: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as tar:
        return {entry.name.split("/", 1)[1]: entry for entry in tar.getmembers()}


def git(root: Path) -> None:
    subprocess.run(["git", "-C", str(root), "init", "-q"], check=True)


def test_what_git_ignores_and_tests_stay_here(checkout: Path) -> None:
    git(checkout)
    entries = names_in(pack_code(checkout)[0])
    assert {"pyproject.toml", "infra/__init__.py", "scripts/setup.sh"} <= set(entries)
    assert not [name for name in entries if name.startswith(("tests", "runs")) or name.endswith(".key")]
    assert entries["scripts/setup.sh"].mode == 0o755, "it has to be run there"


def test_the_bytes_follow_from_the_contents_alone(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(checkout)
    first, sha256 = pack_code(checkout)
    for path in checkout.rglob("*.py"):
        path.touch()
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert pack_code(checkout) == (first, sha256)
    (checkout / "infra" / "__init__.py").write_text("changed")
    assert pack_code(checkout)[1] != sha256


def test_without_git_hidden_files_stay_here(checkout: Path) -> None:
    entries = names_in(pack_code(checkout)[0])
    assert "infra/__init__.py" in entries
    assert not [name for name in entries if name.startswith((".", "runs"))]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkout"):
        pack_code(tmp_path)


def test_this_project_packs_into_little() -> None:
    packed, _ = pack_code()
    assert len(packed) < 8 << 20
    entries = names_in(packed)
    assert {"infra/node/__main__.py", "train/loop.py", "constraints.txt", "README.md"} <= set(entries)
