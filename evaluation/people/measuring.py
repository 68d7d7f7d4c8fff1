"""Extract and measure: the trained network's layers, and what they are compared with.

Example:
    >>> results = measure_all(options, trained, Path("data/rocks"), manifest, ["layer4", "penultimate"],
    question)
    >>> results.chosen.name
    'penultimate'
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from data_prep.manifest import Manifest
from data_prep.progress import progress_bar
from evaluation.people.analysis import Measured, Question, measure_features
from evaluation.people.features import SplitFeatures, extract_features, untrained_copy
from evaluation.people.layers import PENULTIMATE
from evaluation.people.similarity import Measure
from evaluation.predict import TrainedModel

# So few numbers an image have no correlation worth the name: their distance it is.
PIXEL_MEASURE: Measure = "euclidean"


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        layers: of the trained network, in the order of a pass.
        chosen: the layer that headlines are of: `penultimate` where it was asked for, else the last one.
        untrained: a list of layers a random network.
        pixels: mean colour and thumbnails.
    """

    layers: list[Measured]
    chosen: Measured
    untrained: list[list[Measured]]
    pixels: list[Measured]

    @property
    def untrained_chosen(self) -> list[Measured]:
        """The chosen layer of each random network."""
        return [one for layers in self.untrained for one in layers if one.name == self.chosen.name]


def measure_all(
    options: argparse.Namespace,
    trained: TrainedModel,
    folder: Path,
    manifest: Manifest,
    names: list[str],
    question: Question,
) -> Results:
    """Measure all named layers of the trained network and of random ones, and the pixels.

    Raises:
        ValueError, RuntimeError: as `extract_features` and `measure_features`.
    """
    chosen = PENULTIMATE if PENULTIMATE in names else names[-1]
    num_networks = 1 + options.num_untrained
    layers: list[list[Measured]] = []
    pixels: list[Measured] = []
    for number in range(num_networks):
        found = _extract(options, trained, folder, manifest, names, number)
        words = "measure" if number == 0 else f"measure random {number}"
        with progress_bar(len(names), words, unit="layer") as bar:
            measured = []
            for name in names:
                # Of random networks, ridge regression only where it is shown.
                with_ridge = not options.no_ridge and (number == 0 or name == chosen)
                measured.append(_measure(name, found, question, with_ridge, is_trained=number == 0))
                bar.update(1)
        layers.append(measured)
        if number == 0:
            pixels = [
                measure_features(
                    name, features, question, measure=PIXEL_MEASURE, with_ridge=not options.no_ridge
                )
                for name, features in (("mean colour", found.mean_colour), ("8×8 pixels", found.thumbnails))
            ]
    headline = next(one for one in layers[0] if one.name == chosen)
    return Results(layers[0], headline, layers[1:], pixels)


def _extract(
    options: argparse.Namespace,
    trained: TrainedModel,
    folder: Path,
    manifest: Manifest,
    names: list[str],
    number: int,
) -> SplitFeatures:
    return extract_features(
        trained,
        folder,
        manifest,
        options.split,
        names,
        model=untrained_copy(trained, options.seed + number) if number else None,
        pooling=options.pool,
        loader=options.loader,
        resolution=options.resolution,
        description=f"random network {number}" if number else "features",
    )


def _measure(
    name: str, found: SplitFeatures, question: Question, with_ridge: bool, *, is_trained: bool
) -> Measured:
    try:
        return measure_features(name, found.layers[name], question, with_ridge=with_ridge)
    except ValueError as error:
        raise ValueError(f"layer {name}{'' if is_trained else ' of a random network'}: {error}") from None
