"""A plan for the terminal: the recommendation, the machines worth a look, and what all of it stands on.

Lines are at most `WIDTH` columns wide. A machine is worth a look where no other is both cheaper and faster;
the recipe's own machine and the alternatives are always shown.
"""

from __future__ import annotations

import textwrap

from infra.plan.estimate import Option
from infra.plan.recommend import Plan, describe, is_p
from infra.plan.throughput import gpu_figure
from infra.plan.work import Work

WIDTH = 110
MAX_ROWS = 16
KINDS = {"measured": "m", "published": "p", "estimated": "e"}


def render(plan: Plan, show_all: bool = False) -> list[str]:
    """The lines of the whole page."""
    lines: list[str] = []
    for work in plan.works if len(plan.works) == 1 else ():
        lines += _head(work, plan)
    if len(plan.works) > 1:
        lines += _wrapped(f"{len(plan.works)} recipes for {plan.works[0].data.name}: {_names(plan)}", "")
    lines += ["", *_recommendation(plan), "", *_rows(plan, show_all), "", *_foot(plan)]
    return lines


def _names(plan: Plan) -> str:
    return ", ".join(work.name for work in plan.works)


def _head(work: Work, plan: Plan) -> list[str]:
    expected = plan.expected.get(work.name)
    sides = [segment.resolution for segment in work.segments]
    pixels = f"{min(sides)}–{max(sides)} px" if len(set(sides)) > 1 else f"{sides[0]} px"
    size = f"{work.data.num_bytes / 1e9:,.1f} GB".replace(".0 GB", " GB")
    lines = [
        f"{work.name}: {work.num_epochs} epochs at {pixels}, as much as {work.epochs_at_224:.2f} at 224 px, "
        f"of {work.data.num_train:,} images ({size})"
    ]
    if expected is not None:
        lines.append(f"top-1 expected: {expected}")
    if work.max_hours is not None:
        lines.append(f"the recipe ends a run after {work.max_hours:g} h (budget.max_hours)")
    if work.early_stopping:
        lines.append("at most: the recipe may stop early")
    return lines


def _recommendation(plan: Plan) -> list[str]:
    option = plan.recommended
    if option is None:
        return ["NOTHING FITS", *_wrapped(plan.reason, "  ")]
    recipe = f"{option.work.name} on " if len(plan.works) > 1 else ""
    lines = [
        f"RECOMMENDED  {recipe}{describe(option)}: {usd_range(option.usd)} in {hours_range(option.hours)}",
        *_wrapped(f"{_gpus(option)} in {plan.region}; {plan.reason}.", "  "),
    ]
    if len(plan.works) > 1 and (expected := plan.expected.get(option.work.name)):
        lines.append(f"  top-1 expected: {expected}")
    lines += [
        *_wrapped(f"{'hours':<13}{_parts(option)}", "  ", 15),
        f"  dollars      hours × {option.num_nodes} × {_price(option)}",
        f"  at worst     ${option.worst_case_usd:,.2f}: the longest estimate, all at the on-demand price",
        f"  training     {hours_range(option.training_hours)}, {usd_range(option.training_usd)} alone, as "
        "docs/recipes.md counts",
        *_wrapped(f"{'quota':<13}{_quota(option)}", "  ", 15),
    ]
    for what, other in plan.alternatives.items():
        quota = " (P quota)" if is_p(other) else ""
        recipe = f"{other.work.name} on " if len(plan.works) > 1 else ""
        lines.append(
            f"  {what + ':':<24}{recipe}{describe(other)}: {usd_range(other.usd)} in "
            f"{hours_range(other.hours)}{quota}"
        )
    return lines


def _gpus(option: Option) -> str:
    return f"{option.num_nodes * option.instance.num_gpus} × {option.instance.gpu}"


def _parts(option: Option) -> str:
    names = {
        "training": (option.fast.training, option.slow.training),
        "validation": (option.fast.validation, option.slow.validation),
        "start": (option.fast.start, option.slow.start),
        "staging": (option.fast.staging, option.slow.staging),
        "interruptions": (option.fast.interruptions, option.slow.interruptions),
    }
    return " + ".join(f"{name} {low:.2f}–{high:.2f}" for name, (low, high) in names.items() if high > 0)


def _price(option: Option) -> str:
    low, high = option.price.low_usd_per_hour, option.price.high_usd_per_hour
    an_hour = f"${low:,.2f}" if low == high else f"${low:,.2f}–{high:,.2f}"
    asked = "asked of AWS now" if option.price.live else f"as of {option.price.date}"
    return f"({an_hour} an hour, {asked}, + volume and address)"


def _quota(option: Option) -> str:
    code, name = option.instance.quota(option.market)
    often = "often 0 in a new account" + (", and for P slow to be raised" if is_p(option) else "")
    return f"{option.vcpus} vCPUs of {code} ({name}): {often}"


def _rows(plan: Plan, show_all: bool) -> list[str]:
    several = len(plan.works) > 1
    last = "recipe" if several else f"{'fits':<6}{'limit':<11}speed"
    head = f"  {'machines':<19}{'GPUs':<11}{'market':<11}{'hours':>11}{'dollars':>16}{'at worst':>11}  {last}"
    rows = [head, "  " + "─" * (WIDTH - 2)]
    chosen = list(plan.options) if show_all else worth_a_look(plan)
    for option in chosen:
        mark = "▸" if option is plan.recommended else " "
        keeps = " " if plan.limits.kept_by(option) else "*"
        speed = "/".join(KINDS[kind] for kind in option.speed_kinds)
        fits = f"{'RAM' if option.fits_ram else 'NVMe':<6}{option.bottleneck:<11}{speed}"
        rows.append(
            f"{mark} {f'{option.num_nodes} × {option.instance.name}':<19}{_gpus(option):<11}"
            f"{option.market.replace('-', ' '):<11}{hours_range(option.hours):>11}{usd_range(option.usd):>16}"
            f"{f'${option.worst_case_usd:,.2f}':>11}{keeps} {option.work.name if several else fits}"
        )
    rest = len(plan.options) - len(chosen)
    if rest:
        rows.append(f"  {rest} more, each dearer or slower than one of these: --all")
    if any(not plan.limits.kept_by(option) for option in chosen):
        rows.append(
            f"  * does not keep to {', '.join(plan.limits.in_words)} in the worst case of its estimate"
        )
    return rows


def worth_a_look(plan: Plan) -> list[Option]:
    """The options that no other beats in dollars and hours, the chosen ones, and the recipe's machine."""
    front: list[Option] = []
    best_hours = float("inf")
    for option in plan.options:  # the cheapest first
        if sum(option.hours) < best_hours * 0.97:
            front.append(option)
            best_hours = sum(option.hours)
    keep = [plan.recommended, *plan.alternatives.values()]
    if len(plan.works) == 1:
        own = plan.works[0].instance_type
        keep += [o for o in plan.options if o.instance.name == own and o.num_nodes == 1]
    asked = [option for option in keep if option is not None]
    front = front[: max(0, MAX_ROWS - len(asked))]
    chosen = {id(option) for option in (*front, *asked)}
    return [option for option in plan.options if id(option) in chosen]


def _foot(plan: Plan) -> list[str]:
    lines = []
    if len(plan.works) == 1:
        lines += _wrapped(
            "fits: where the data do. limit: what most of the hours go to. speed: whether its slow/fast "
            "bound was m measured here, p published by others, or e estimated. Images/s of one GPU, "
            "ResNet-50, 224 px:",
            "",
        )
    else:
        lines.append("images/s of one GPU, ResNet-50, 224 px:")
    gpus = dict.fromkeys(option.instance.gpu for option in worth_a_look(plan))
    for gpu in gpus:
        slow, fast = gpu_figure(gpu, "slow"), gpu_figure(gpu, "fast")
        lines += _wrapped(
            f"{gpu}: {slow.images_per_second:,.0f} ({slow.kind}: {slow.source}) to "
            f"{fast.images_per_second:,.0f} images/s ({fast.kind}: {fast.source})",
            "  ",
        )
    lines.append("what it stands on:")
    for sentence in plan.assumptions:
        lines += _wrapped(sentence, "  - ")
    if plan.left_out:
        lines += _wrapped(f"left out: {'; '.join(_short(plan.left_out))}", "")
    for sentence in plan.warnings:
        lines += _wrapped(f"note: {sentence}", "")
    return lines


def _short(left_out: tuple[str, ...]) -> list[str]:
    """Sentences that differ in the machine alone, together."""
    together: dict[str, list[str]] = {}
    for sentence in left_out:
        name, _, rest = sentence.partition(" ")
        together.setdefault(rest, []).append(name)
    return [
        f"{', '.join(names)} {rest.replace('has no', 'have no', 1) if len(names) > 1 else rest}"
        for rest, names in together.items()
    ]


def _wrapped(text: str, indent: str, hang: int = 2) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * max(hang, len(indent)),
        break_on_hyphens=False,
    )


def hours_range(hours: tuple[float, float]) -> str:
    """`17–52 min`, `2.5–4.2 h`."""
    low, high = hours
    if high < 0.1:
        return f"{60 * low:.1f}–{60 * high:.1f} min"
    if high < 1:
        return f"{60 * low:.0f}–{60 * high:.0f} min"
    return f"{low:.1f}–{high:.1f} h"


def usd_range(usd: tuple[float, float]) -> str:
    """`$0.73–8.49`, `$122–140`."""
    low, high = usd
    return f"${low:,.0f}–{high:,.0f}" if high >= 100 else f"${low:,.2f}–{high:,.2f}"
