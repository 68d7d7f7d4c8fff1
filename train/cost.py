"""What a run costs: hours times the price of the machine, from the recipe or the dated price file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml

from train.config import BudgetSection

PRICES_PATH = Path(__file__).with_name("prices.yaml")


@dataclass(frozen=True)
class Price:
    """Dollars an hour, and in words where that comes from."""

    usd_per_hour: float
    source: str

    def cost_usd(self, seconds: float) -> float:
        return self.usd_per_hour * seconds / 3600


def find_price(budget: BudgetSection) -> Price | None:
    """The price of an hour, or None where the recipe names neither price nor machine.

    Raises:
        ValueError: the price file does not know the machine.
    """
    if budget.usd_per_hour is not None:
        return Price(budget.usd_per_hour, "budget.usd_per_hour of the recipe")
    if budget.instance_type is None:
        return None
    table = yaml.safe_load(PRICES_PATH.read_text(encoding="utf-8"))
    prices = table["usd_per_hour"]
    if budget.instance_type not in prices:
        near = difflib.get_close_matches(budget.instance_type, prices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(prices)}"
        raise ValueError(
            f"budget.instance_type: no price for {budget.instance_type!r}; {hint} Or set budget.usd_per_hour"
        )
    source = f"{budget.instance_type} on demand, {table['region']}, {table['date']}"
    return Price(float(prices[budget.instance_type]), source)
