"""All machines for a recipe, and the cheapest that keeps to the limits.

"Keeps to" means by the worst case of the estimate: the longest hours at the highest price of the market.
"Cheapest" means by the middle of the dollars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.errors import UserError
from infra.plan.dated import age_warning, load_dated
from infra.plan.estimate import NVME_SHARE, RAM_SHARE, ROOT_GIB, Option, breakdown, estimate, misfit
from infra.plan.expected import Expected, expected_of, recipes_in
from infra.plan.instances import find_instance, load_instances
from infra.plan.prices import (
    DEFAULT_REGION,
    MARKETS,
    Market,
    NoPrice,
    Price,
    file_price,
    known_regions,
    price_table,
)
from infra.plan.throughput import table
from infra.plan.work import Work, work_of

CONFIGS = Path("configs")
NODE_COUNTS = (1, 2, 4)
FASTER_AT_MOST = 2.0  # times the dollars of the cheapest: what an alternative in a hurry may cost
# Changes that leave a recipe's accuracy as it is.
HARMLESS = ("data.path=", "data.loader=", "run.", "budget.", "tracking.", "checkpoint.", "preemption.")
SAVED_HOURS = 0.5  # that it has to save at least
WAITING_USD_PER_HOUR = 5.0  # for somebody in a hurry: dollars and hours in one sum


@dataclass(frozen=True)
class Limits:
    """What the user set; None: nothing."""

    target_top1: float | None = None
    max_usd: float | None = None
    max_hours: float | None = None

    def kept_by(self, option: Option) -> bool:
        return (self.max_usd is None or option.usd[1] <= self.max_usd) and (
            self.max_hours is None or option.hours[1] <= self.max_hours
        )

    def __str__(self) -> str:
        top1 = [] if self.target_top1 is None else [f"top-1 {self.target_top1:.1%}"]
        return ", ".join([*top1, *self.in_words])

    @property
    def in_words(self) -> list[str]:
        """Dollars and hours."""
        parts = []
        if self.max_usd is not None:
            parts.append(f"${self.max_usd:,.2f}".removesuffix(".00"))
        if self.max_hours is not None:
            parts.append(f"{self.max_hours:g} h")
        return parts


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        options: all that can run, the cheapest first.
        recommended: the cheapest that keeps to the limits, None where none does.
        reason: why it, or what to change.
        alternatives: other choices that keep to the limits, by what they are for: in a hurry, and without P
            instances, whose quota is the hardest to get.
        left_out: a sentence for each machine that cannot be used.
        assumptions, warnings: sentences.
    """

    works: tuple[Work, ...]
    options: tuple[Option, ...]
    recommended: Option | None
    reason: str
    limits: Limits
    region: str
    alternatives: dict[str, Option] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    expected: dict[str, Expected] = field(default_factory=dict)


def plan(
    recipe: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    target_top1: float | None = None,
    max_usd: float | None = None,
    max_hours: float | None = None,
    region: str = DEFAULT_REGION,
    data: str | None = None,
    data_set: str = "imagenet",
    num_nodes: Iterable[int] = NODE_COUNTS,
    markets: Iterable[Market] = MARKETS,
    instance_types: Iterable[str] | None = None,
    live: bool | None = False,
) -> Plan:
    """Estimate a recipe, or all recipes of a folder, on every machine, and recommend one.

    Args:
        recipe: a YAML file; a folder, or None for `configs/`: those of its recipes for `data_set` that reach
            `target_top1`.
        data: a folder or `s3://…` with the prepared data set; None: the size that is known of it.
        live: True: ask AWS for prices; None: where credentials are at hand; False: the dated file.

    Raises:
        UserError: a fault of the recipe, an unknown machine or region, or unknown data.
    """
    limits = Limits(target_top1, max_usd, max_hours)
    path = Path(recipe) if recipe is not None else CONFIGS
    paths = recipes_in(path, data_set, target_top1) if path.is_dir() else [path]
    works = tuple(work_of(each, list(overrides), data) for each in paths)
    expected = {work.name: row for work in works if (row := expected_of(work.recipe_path.stem))}
    price_of, notes = _prices(region, live)
    instances = [find_instance(name) for name in instance_types or load_instances()]
    options: list[Option] = []
    left_out: dict[str, None] = {}
    for instance in instances:
        for market in markets:
            try:
                on_demand = price_of(instance.name, "on-demand")
                price = on_demand if market == "on-demand" else price_of(instance.name, market)
            except NoPrice as error:
                left_out[str(error)] = None
                continue
            for nodes in num_nodes:
                for work in works:
                    option = estimate(work, instance, nodes, price, on_demand)
                    if fault := misfit(work, instance, nodes) or _cut_short(option):
                        left_out[fault] = None
                    else:
                        options.append(option)
    if not options:
        raise UserError("no machine can run this: " + "; ".join(left_out))
    options.sort(key=lambda option: (sum(option.usd), sum(option.hours)))
    chosen, reason = _choose(options, limits, works, expected)
    return Plan(
        works=works,
        options=tuple(options),
        recommended=chosen,
        reason=reason,
        limits=limits,
        region=region,
        alternatives=_alternatives(_within(options, limits, expected), chosen),
        left_out=tuple(left_out),
        assumptions=_assumptions(works),
        warnings=(*notes, *_changes(overrides, expected), *_age_warnings(options)),
        expected=expected,
    )


def _prices(region: str, live: bool | None) -> tuple[Callable[[str, Market], Price], list[str]]:
    """Who says prices, and sentences on what went wrong."""
    if live is not False:
        from infra.plan.live_prices import LivePrices, has_credentials

        if live or has_credentials():
            asked = LivePrices(region)
            asked.load(list(load_instances()))
            return asked.price_of, list(asked.notes)
    if region not in known_regions():
        raise UserError(
            f"train/prices.yaml has no prices of {region}, only of {', '.join(known_regions())}: pass --live"
        )
    return lambda name, market: file_price(name, market, region), []


def _reaches(option: Option, limits: Limits, expected: dict[str, Expected]) -> bool:
    if limits.target_top1 is None:
        return True
    row = expected.get(option.work.name)
    return row is not None and row.low >= limits.target_top1


def _within(options: list[Option], limits: Limits, expected: dict[str, Expected]) -> list[Option]:
    return [option for option in options if _reaches(option, limits, expected) and limits.kept_by(option)]


def _choose(
    options: list[Option], limits: Limits, works: tuple[Work, ...], expected: dict[str, Expected]
) -> tuple[Option | None, str]:
    within = _within(options, limits, expected)
    if within:
        of = f"{len(options)} choices"
        if str(limits):
            of = f"the {len(within)} of {of} that keep to {limits}"
        return within[0], f"the cheapest, by the middle of its dollars, of {of}"
    reaching = [option for option in options if _reaches(option, limits, expected)]
    if not reaching:
        names = ", ".join(f"{work.name}: {expected.get(work.name, 'no figure')}" for work in works)
        return None, (
            f"no recipe here is expected to reach {limits.target_top1:.1%} ({names}): leave the recipe out, "
            "and one is chosen, or lower --target-top1"
        )
    changes = []
    in_time = [o for o in reaching if limits.max_hours is None or o.hours[1] <= limits.max_hours]
    in_budget = [o for o in reaching if limits.max_usd is None or o.usd[1] <= limits.max_usd]
    if in_time and limits.max_usd is not None:
        best = min(in_time, key=lambda option: option.usd[1])
        changes.append(f"--max-usd {_round_up(best.usd[1])} ({describe(best)})")
    if in_budget and limits.max_hours is not None:
        best = min(in_budget, key=lambda option: option.hours[1])
        changes.append(f"--max-hours {_round_up(best.hours[1])} ({describe(best)})")
    if not changes:
        cheap = min(reaching, key=lambda option: option.usd[1])
        quick = min(reaching, key=lambda option: option.hours[1])
        changes.append(
            f"the least is ${cheap.usd[1]:,.2f} ({describe(cheap)}) "
            f"and {quick.hours[1]:.1f} h ({describe(quick)})"
        )
    return None, (
        f"nothing keeps to {limits}. Raise {' or '.join(changes)}; or take a shorter recipe, or let "
        "budget.shorten=true fit the schedule into the budget"
    )


def describe(option: Option) -> str:
    """`2 × g6.12xlarge, spot`."""
    return f"{option.num_nodes} × {option.instance.name}, {option.market.replace('-', ' ')}"


def _round_up(value: float) -> str:
    return f"{-(-value * 10 // 1) / 10:g}"


def _alternatives(within: list[Option], chosen: Option | None) -> dict[str, Option]:
    """Of those that keep to the limits, the cheapest first."""
    if chosen is None:
        return {}
    found = {}
    base, where = chosen, ""
    if is_p(chosen):
        within = [option for option in within if not is_p(option)]
        if not within:
            return {}
        base, where = within[0], "without P, "
        found["without P"] = base
    quicker = [
        option
        for option in within
        if option.hours[1] < base.hours[1] - SAVED_HOURS
        and option.hours[1] < 0.7 * base.hours[1]
        and sum(option.usd) <= FASTER_AT_MOST * sum(base.usd)
    ]
    if quicker:
        best = min(quicker, key=lambda option: sum(option.usd) + WAITING_USD_PER_HOUR * sum(option.hours))
        found[f"{where}in a hurry"] = best
    return found


def is_p(option: Option) -> bool:
    """Whether it is a P instance: their quota is the hardest to get."""
    return option.instance.family.startswith("p")


def _cut_short(option: Option) -> str | None:
    """A sentence where budget.max_hours ends the recipe much earlier than on its own machine."""
    work = option.work
    if not option.fast.capped or work.instance_type not in load_instances():
        return None
    own = breakdown(work, find_instance(work.instance_type), 1, "on-demand", "slow").share
    if option.fast.share >= 0.95 * own:
        return None
    epochs = work.num_epochs
    return (
        f"{option.instance.name} is ended by budget.max_hours={work.max_hours:g} after "
        f"{option.fast.share * epochs:.0f} epochs, {work.instance_type} after {own * epochs:.0f}"
    )


def _changes(overrides: Sequence[str], expected: dict[str, Expected]) -> list[str]:
    changed = [text for text in overrides if not text.startswith(HARMLESS)]
    if not changed or not expected:
        return []
    return [f"top-1 is expected of the recipe as it is, not with {' '.join(changed)}"]


def _assumptions(works: tuple[Work, ...]) -> tuple[str, ...]:
    speeds = table()
    over, between = speeds["overheads"], speeds["between_nodes"]
    staging = over["staging_gbytes_per_second"]
    slow, fast = (100 * share for share in over["staging_network_share"])
    return (
        *dict.fromkeys(work.network_note for work in works),
        *dict.fromkeys(f"{work.data.name}: {work.data.source}" for work in works),
        "time grows with pixels and with a network's multiply-adds; no network runs exactly as fast as those",
        f"start {over['start_minutes'][0]}–{over['start_minutes'][1]} min; staging from S3 at {slow:.0f}% of "
        f"the guaranteed to {fast:.0f}% of the highest network, at most {staging:g} GB/s",
        f"several nodes: the gradient takes {between['low']['network_share']:.0%} of the network without "
        f"overlap (worst) to {between['high']['network_share']:.0%} with full overlap (best); not measured",
        f"spot, worst case: an interruption in every {over['restart_every_hours']} h of each node, which "
        f"repeats start, staging and {over['restart_lost_minutes']} min; at worst, all hours at "
        "the on-demand price",
        f"in a hurry: an hour of waiting counts as ${WAITING_USD_PER_HOUR:g}",
        f"dollars include {ROOT_GIB} GiB of gp3 and a public address a node; S3 is not included",
        f"data fit where they take at most {RAM_SHARE:.0%} of the memory or {NVME_SHARE:.0%} of the disks",
    )


def _age_warnings(options: list[Option]) -> list[str]:
    found = []
    if not any(option.price.live for option in options):
        found.append(age_warning("prices (train/prices.yaml)", price_table()["date"]))
    found.append(age_warning("speeds (infra/plan/throughput.yaml)", table()["date"]))
    found.append(age_warning("machines (infra/plan/instances.yaml)", load_dated("instances.yaml")["date"]))
    return [sentence for sentence in found if sentence]
