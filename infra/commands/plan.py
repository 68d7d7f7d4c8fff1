"""`python -m infra plan RECIPE --max-usd 25`: hours and dollars of each machine before anything is started.

Without a recipe, or with a folder of them, one is chosen by --target-top1, too. Makes nothing, costs nothing.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from infra.console import Console
from infra.plan import MARKETS, plan
from infra.plan.as_json import plan_facts
from infra.plan.prices import DEFAULT_REGION
from infra.plan.recommend import NODE_COUNTS
from infra.plan.table import render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a YAML file, or a folder of them (default: configs/)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--target-top1", type=_fraction, help="what the recipe is to reach, e.g. 0.76")
    parser.add_argument(
        "--max-usd", type=_positive, help="what it may cost, by the worst case of its estimate"
    )
    parser.add_argument("--max-hours", type=_positive, help="how long it may take, likewise")
    parser.add_argument(
        "--data", help="the prepared data set, a folder or s3://… (default: by its known size)"
    )
    parser.add_argument(
        "--data-set", default="imagenet", help="where a recipe is to be chosen: for which data"
    )
    parser.add_argument("--num-nodes", type=int, nargs="+", default=list(NODE_COUNTS), metavar="N")
    parser.add_argument("--market", choices=MARKETS, action="append", help="only this one (default: both)")
    parser.add_argument("--instance-type", action="append", metavar="TYPE", help="only these (default: all)")
    live = parser.add_mutually_exclusive_group()
    live.add_argument(
        "--live", action="store_true", default=None, help="ask AWS for prices (default: if keys are there)"
    )
    live.add_argument("--offline", dest="live", action="store_false", help="prices of train/prices.yaml only")
    parser.add_argument("--all", action="store_true", help="every machine, not only those worth a look")


def run(options: argparse.Namespace, console: Console) -> int:
    recipe, overrides = options.recipe, list(options.overrides)
    if recipe is not None and "=" in recipe:  # no recipe, but something to change in all of them
        recipe, overrides = None, [recipe, *overrides]
    found = plan(
        None if recipe is None else Path(recipe),
        overrides,
        target_top1=options.target_top1,
        max_usd=options.max_usd,
        max_hours=options.max_hours,
        region=options.region or _own_region(),
        data=options.data,
        data_set=options.data_set,
        num_nodes=sorted(set(options.num_nodes)),
        markets=options.market or MARKETS,
        instance_types=options.instance_type,
        live=options.live,
    )
    if not console.as_json:
        for line in render(found, options.all):
            console.say(line)
    console.result(plan_facts(found))
    return 0 if found.recommended is not None else 1


def _own_region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or DEFAULT_REGION


def _fraction(text: str) -> float:
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError("must be a fraction such as 0.76 (or 76%)")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value
