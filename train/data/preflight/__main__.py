"""Measure what loader, model, memory and disk of this machine can do for a recipe, and say what limits it.

python -m train.data.preflight configs/demo.yaml data.path=data/intel
python -m train.data.preflight configs/demo.yaml data.path=data/intel --nproc-per-node 4 --json figures.json
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from train.config import RecipeError, load_recipe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.preflight",
        description="measure whether data or model will limit a training on this machine, before it starts",
    )
    parser.add_argument("recipe", type=Path, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="ranks that torchrun will start (default: one a GPU, or 1)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="of each of a loader's windows and of each model (default: 2)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options = parser.parse_intermixed_args(arguments)
    if options.nproc_per_node is not None and options.nproc_per_node < 1:
        parser.error("--nproc-per-node must be at least 1")
    if not options.seconds > 0:
        parser.error("--seconds must be positive")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.absolute().parent}")
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from train.data.preflight.command import preflight

    cores = os.sched_getaffinity(0)
    try:
        fault = preflight(recipe, options.nproc_per_node, options.seconds, options.json)
    except (ValueError, RuntimeError, OSError) as error:
        fault = str(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        os.sched_setaffinity(0, cores)
    if fault is not None:
        print(f"error: {fault}", file=sys.stderr)
    return 0 if fault is None else 1


if __name__ == "__main__":
    sys.exit(main())
