"""What top-1 comes out of a recipe (`expected.yaml`), and which recipes reach a target.

Example:
    >>> expected_of("imagenet_resnet50_16").low
    0.738
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infra.errors import UserError
from infra.plan.dated import load_dated


@dataclass(frozen=True)
class Expected:
    """Top-1 of a recipe, low and high, by whom, and whether it was measured here."""

    recipe: str
    data_set: str
    low: float
    high: float
    kind: str
    by: str

    def __str__(self) -> str:
        figure = f"{self.low:.1%}" if self.low == self.high else f"{self.low * 100:.1f}–{self.high:.1%}"
        return f"{figure} ({self.kind}: {self.by})"


def all_expected() -> dict[str, Expected]:
    """Every recipe with a figure, by name."""
    rows = load_dated("expected.yaml")["recipes"]
    return {
        name: Expected(
            name, row["data_set"], float(row["top1"][0]), float(row["top1"][1]), row["kind"], row["by"]
        )
        for name, row in rows.items()
    }


def expected_of(recipe: str) -> Expected | None:
    """The figure of a recipe's name, None where there is none."""
    return all_expected().get(recipe)


def recipes_in(folder: Path, data_set: str, target_top1: float | None) -> list[Path]:
    """Recipes of a folder for this data set that reach the target, by what is expected at least.

    Raises:
        UserError: there is none.
    """
    expected = all_expected()
    of_set = [
        path
        for path in sorted(folder.glob("*.yaml"))
        if path.stem in expected and expected[path.stem].data_set == data_set
    ]
    if not of_set:
        names = sorted({row.data_set for row in expected.values()})
        raise UserError(
            f"{folder} has no recipe with a known top-1 for {data_set}; known data sets: {', '.join(names)}"
        )
    reaching = [path for path in of_set if target_top1 is None or expected[path.stem].low >= target_top1]
    if not reaching:
        best = max(of_set, key=lambda path: expected[path.stem].low)
        raise UserError(
            f"no recipe of {folder} for {data_set} is expected to reach {target_top1:.1%}; the best is "
            f"{best.stem} with {expected[best.stem]}: lower --target-top1"
        )
    return reaching
