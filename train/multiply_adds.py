"""Count the multiply-adds and parameters of a recipe's network, for estimates of its cost.

    python -m train.multiply_adds configs/cifar10.yaml --resolution 32

prints a line of JSON: `{"gmacs": 10⁹ multiply-adds of one image, "params": …, "resolution": pixels}`. Weights
are not loaded, and 1,000 classes are assumed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from train.config import RecipeError, load_recipe

NUM_CLASSES = 1_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.multiply_adds", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--resolution", type=int, help="pixels; default: the one that training ends with")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        from train.models.build import build_model
        from train.throughput import BACKWARD_AND_FORWARD, flops_per_image

        model = build_model(
            recipe.model.model_copy(update={"pretrained": False, "checkpoint": None}), NUM_CLASSES
        )
    except (RecipeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    side = options.resolution or recipe.data.resolution_at(recipe.num_epochs)
    flops = flops_per_image(model, side)
    gmacs = None if flops is None else flops / BACKWARD_AND_FORWARD / 2 / 1e9
    params = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"gmacs": gmacs, "params": params, "resolution": side}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
