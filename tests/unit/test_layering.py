"""The direction of imports, read from the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = ["roijpeg", "data_prep", "train", "evaluation", "serve"]
INFRA_MAY_IMPORT = {"train.config", "train.cost", "data_prep.manifest", "data_prep.storage"}


def imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("package", [*LAYERS, "infra"])
def test_packages_import_only_to_their_left(package: str) -> None:
    to_the_right = set() if package == "infra" else set(LAYERS[LAYERS.index(package) + 1 :]) | {"infra"}
    for path in (ROOT / package).rglob("*.py"):
        modules = imported_modules(path)
        assert not {m for m in modules if m.split(".")[0] in to_the_right}, path
        if package == "data_prep":
            assert not {m for m in modules if m.split(".")[0] == "torch"}, path
        if package == "infra":
            ours = {m for m in modules if m.split(".")[0] in LAYERS}
            assert not {m for m in ours if not any(m.startswith(ok) for ok in INFRA_MAY_IMPORT)}, path
