"""What would make loading faster, tried out in memory on some of the samples.

Example:
    >>> for lever in preparation_levers(jpegs, manifest.images, largest_resolution=224, core_rate=280): ...
"""

from __future__ import annotations

import contextlib
import time
import typing
from typing import Any

import numpy as np
import simplejpeg

from data_prep.manifest import ImageSettings
from data_prep.normalize import Rejected, normalize
from train.config import DataSection
from train.data.loaders import LoaderPlan, build_loader, choose_backend
from train.data.preflight.figures import Lever
from train.data.preflight.measure import loader_rate

NUM_SAMPLES = 200
CAPS = (400, 320, 256, 192, 160, 128, 96)  # pixels; round figures between the usual 500 and small images
MAX_CAPS = 2  # tried
# A capped image must still be larger than what is cropped out of it and shown. Where the longest side is
# capped, the shortest of a 4:3 picture must be.
ROOM = {"shortest": 1.3, "longest": 1.3 * 4 / 3}
WORTHWHILE = 1.1  # speed-up of the loader; less is not worth preparing again


def preparation_levers(
    jpegs: list[bytes], images: ImageSettings, largest_resolution: int, core_rate: float, seconds: float = 6.0
) -> list[Lever]:
    """Ways to prepare the same images so that they decode faster, the least change first.

    Args:
        jpegs: stored samples.
        images: how they were made.
        largest_resolution: of the recipe, in pixels.
        core_rate: images a second that one core of the loader makes of them.
        seconds: for each of the up to four ways; fewer samples are tried where that is too short.
    """
    levers = []
    for words, settings in candidates(images, largest_resolution, longest_sides(jpegs)):
        old, new = _prepared_again(jpegs, settings, seconds)
        if not old:
            continue
        old_seconds, new_seconds = decode_seconds(old, new)
        # The loader also crops, resizes and copies; only its share of decoding becomes shorter.
        share = min(1.0, old_seconds * core_rate)
        speedup = 1 / (1 - share + share * new_seconds / old_seconds)
        bytes_ratio = sum(map(len, new)) / sum(map(len, old))
        if speedup >= WORTHWHILE or bytes_ratio <= 1 / WORTHWHILE:
            evidence = (
                f"measured on {len(old)} samples: {old_seconds / new_seconds:.1f} times faster to decode"
            )
            levers.append(Lever(f"to prepare again with {words}", speedup, evidence, True, bytes_ratio))
    return levers


def candidates(
    images: ImageSettings, largest_resolution: int, sides: list[int]
) -> list[tuple[str, ImageSettings]]:
    """(command-line words, settings) worth trying, the least change first.

    Args:
        sides: longest sides of some stored images, in pixels; a cap that hardly any exceeds changes nothing.
    """
    encodings: list[tuple[str, dict[str, Any]]] = [("", {})]
    found: list[tuple[str, dict[str, Any]]] = []
    if images.encode == "lossless":
        encodings.append(("`--encode q90`", {"encode": "q90"}))
        found.append(encodings[-1])
    least = ROOM[images.cap_side] * largest_resolution
    exceeded = float(np.median(sides)) if sides else 0.0
    below = min(images.resolution_cap or 65535, exceeded)
    for cap in [cap for cap in CAPS if least <= cap < below][:MAX_CAPS]:
        words, changes = encodings[-1]
        capped = f"`--resolution-cap {cap}`"
        found.append((f"{words} and {capped}" if words else capped, {**changes, "resolution_cap": cap}))
    return [(words, images.model_copy(update=changes)) for words, changes in found]


def longest_sides(jpegs: list[bytes]) -> list[int]:
    """Of each image, in pixels."""
    return [max(simplejpeg.decode_jpeg_header(jpeg, strict=False)[:2]) for jpeg in jpegs]


def _prepared_again(
    jpegs: list[bytes], settings: ImageSettings, seconds: float
) -> tuple[list[bytes], list[bytes]]:
    """(samples as stored, the same as `prepare` would make them with `settings`)."""
    old, new = [], []
    end = time.perf_counter() + seconds
    for jpeg in jpegs:
        with contextlib.suppress(Rejected):
            new.append(normalize(jpeg, settings, statistics=False).jpeg)
            old.append(jpeg)
        if time.perf_counter() > end:
            break
    return old, new


def decode_seconds(old: list[bytes], new: list[bytes]) -> tuple[float, float]:
    """Mean seconds to decode an image of each list in one thread, the better of two turns taken by both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):
        for jpegs, result in zip((old, new), times, strict=True):
            begin = time.perf_counter()
            for jpeg in jpegs:
                simplejpeg.decode_jpeg(jpeg, "RGB", strict=False)
            result.append((time.perf_counter() - begin) / len(jpegs))
    return min(times[0]), min(times[1])


def loader_levers(
    present: str, plan: LoaderPlan, resolution: int, present_rate: float, seconds: float
) -> list[Lever]:
    """Other loaders that are installed and were measured to be faster than the reference one."""
    if present != "reference":
        return []
    levers = []
    for name in typing.get_args(DataSection.model_fields["loader"].annotation):
        if name in ("auto", present):
            continue
        rate = _rate_of(name, plan, resolution, seconds)
        if rate is not None and rate > WORTHWHILE * present_rate:
            evidence = f"measured: {rate / present_rate:.1f} times as fast"
            levers.append(Lever(f"data.loader={name}", rate / present_rate, evidence, False))
    return sorted(levers, key=lambda lever: -lever.speedup)


def _rate_of(name: str, plan: LoaderPlan, resolution: int, seconds: float) -> float | None:
    try:
        choose_backend(name, plan.manifest.format)
        with contextlib.closing(build_loader(name, plan)) as loader:
            return loader_rate(loader, resolution, seconds)
    except Exception:  # not installed, not for these shards or this machine: then it is none to advise
        return None
