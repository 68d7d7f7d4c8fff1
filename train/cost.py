"""What a run costs: hours times the price of the machine, from the recipe or the dated price file."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.config import BudgetSection

RESERVE = 0.03  # of the rest of a budget, for epochs that take longer than those before
PRICES_PATH = Path(__file__).with_name("prices.yaml")


@dataclass(frozen=True)
class Price:
    """Dollars an hour, and in words where that comes from."""

    usd_per_hour: float
    source: str

    def cost_usd(self, seconds: float) -> float:
        return self.usd_per_hour * seconds / 3600


class Budget:
    """What a run may cost, in dollars and hours, over all its starts.

    Raises:
        ValueError: a limit in dollars, and no price.
    """

    def __init__(self, config: BudgetSection, price: Price | None) -> None:
        if config.max_usd is not None and price is None:
            raise ValueError("budget.max_usd needs a price: set budget.usd_per_hour or budget.instance_type")
        self._price = price
        limits = {}
        if config.max_hours is not None:
            limits[f"budget.max_hours={config.max_hours:g}"] = config.max_hours * 3600
        if config.max_usd is not None and price is not None and price.usd_per_hour > 0:
            limits[f"budget.max_usd={config.max_usd:g}"] = config.max_usd / price.usd_per_hour * 3600
        self.name, self.seconds = min(limits.items(), key=lambda limit: limit[1], default=("", math.inf))

    def is_spent(self, elapsed_seconds: float) -> bool:
        return elapsed_seconds >= self.seconds

    def seconds_left(self, elapsed_seconds: float) -> float:
        """What may be planned with: a part of the rest is kept for epochs that take longer."""
        return (self.seconds - elapsed_seconds) * (1 - RESERVE)


def load_prices() -> dict[str, Any]:
    """The dated price file: `date`, `region`, `usd_per_hour`, `spot_usd_per_hour`, `storage` and the like."""
    table: dict[str, Any] = yaml.safe_load(PRICES_PATH.read_text(encoding="utf-8"))
    return table


def find_price(budget: BudgetSection) -> Price | None:
    """The price of an hour, or None where the recipe names neither price nor machine.

    Raises:
        ValueError: the price file does not know the machine.
    """
    if budget.usd_per_hour is not None:
        return Price(budget.usd_per_hour, "budget.usd_per_hour of the recipe")
    if budget.instance_type is None:
        return None
    table = load_prices()
    prices = table["usd_per_hour"]
    if budget.instance_type not in prices:
        near = difflib.get_close_matches(budget.instance_type, prices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(prices)}"
        raise ValueError(
            f"budget.instance_type: no price for {budget.instance_type!r}; {hint} Or set budget.usd_per_hour"
        )
    source = f"{budget.instance_type} on demand, {table['region']}, {table['date']}"
    return Price(float(prices[budget.instance_type]), source)
