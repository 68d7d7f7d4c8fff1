"""The embedded data set: pictures drawn here and stored as ImageNet stores its own. No download.

    python -m data_prep generate --out data/synthetic-source

writes `train/<class>/<name>.JPEG` and `val/<class>/<name>.JPEG`, ten classes of objects in random colours,
light, size, angle and clutter. The files are as mixed as in a real archive: sides of 200 to 500 pixels,
several qualities and subsamplings, some progressive, some grey, and ten that are not what their name says,
six of them beyond use (STRANGE). So every step of the pipeline has something to do.

A picture is a pure function of (seed, class, index): neither the number of workers nor of images changes a
byte, and a small set is a part of a larger one. Colours, contrast and the area an object covers are drawn
without regard to its class, so that only its form tells it.

Example:
    >>> generate(Path("data/synthetic-source"), seed=0)  # returns at once when called again
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[Any]
Rng = np.random.Generator

GENERATOR_VERSION = 1  # raise it with any change of the pictures
VAL_EVERY = 5  # every fifth image of a class belongs to val
DESCRIPTION = "dataset.json"

# One strange file a class, in class order, and its index there. Normalisation can use the first four; the
# others are beyond use. All but one PNG are in train, so that val keeps its number of images.
STRANGE = ("png", "png", "png", "cmyk", "truncated", "truncated", "empty", "text", "zeroed", "damaged")
STRANGE_INDEX = (2, 2, 4, 2, 2, 2, 2, 2, 2, 2)


# --- Forms: parts in units of about the form's radius, y upward, painted in order -------------------------


class Part(NamedTuple):
    """A filled polygon, points (N, 2). Ink goes from 0, the object's own colours, to 1; None is a hole."""

    points: Array
    ink: float | None = 0.0


def _polar(radius: Array | float, angle: Array, centre: tuple[float, float] = (0, 0)) -> Array:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1) + np.asarray(centre)


def _circle(radius: float, x: float = 0, y: float = 0, corners: int = 32) -> Array:
    return _polar(radius, np.linspace(0, 2 * np.pi, corners, endpoint=False), (x, y))


def _turned(points: Array, angle: float) -> Array:
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = points[:, 0], points[:, 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=1)


def _petal(length: float, width: float, angle: float, base: float = 0, fullness: float = 0.5) -> Array:
    """A drop from `base` to `base + length` along `angle`; fullness < 0 moves its belly inward."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    along = (1 - np.cos(turn)) / 2
    belly = along**fullness if fullness > 0 else (1 - along) ** -fullness
    return _turned(np.stack([base + length * along, width / 2 * np.sin(turn) * belly], 1), angle)


def _ribbon(path: Array, width: Array | float) -> Array:
    """The outline of a line of the given width along path (N, 2)."""
    tangent = np.gradient(path, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
    normal *= np.reshape(width, (-1, 1)) / 2 / np.linalg.norm(normal, axis=1, keepdims=True)
    return np.concatenate([path + normal, (path - normal)[::-1]])


def _butterfly(rng: Rng) -> list[Part]:
    parts = []
    upper, lower = rng.uniform(0.45, 0.85), rng.uniform(-0.9, -0.55)
    upper_width, lower_length = rng.uniform(0.75, 1.0), rng.uniform(0.65, 0.95)
    spot = rng.uniform(0.08, 0.2)
    for length, width, angle in ((lower_length, 0.75, lower), (1.15, upper_width, upper)):
        wing = [
            Part(_petal(length, width, angle)),
            Part(_petal(length * 0.62, width * 0.6, angle, length * 0.25), 0.45),
            Part(_circle(spot, *(0.72 * length * np.array([np.cos(angle), np.sin(angle)]))), 1.0),
        ]
        parts += wing + [Part(p.points * (-1, 1), p.ink) for p in wing]
    for side in (-1, 1):
        bow = np.linspace(0, 1, 12)
        path = np.stack([side * 0.3 * bow**2, 0.4 + 0.45 * bow], axis=1)
        parts.append(Part(_ribbon(path, 0.045), 1.0))
    return [*parts, Part(_circle(1.0) * (0.08, 0.5), 1.0)]


def _dice(rng: Rng) -> list[Part]:
    # The three edges that leave the corner nearest to the eye, as they look on the picture.
    yaw, pitch = rng.uniform(0.45, 1.1), rng.uniform(0.35, 0.85)
    across = np.array([-np.cos(yaw), np.sin(yaw), 0])
    upward = np.array([-np.sin(yaw) * np.sin(pitch), -np.cos(yaw) * np.sin(pitch), np.cos(pitch)])
    edges = np.stack([across, upward], axis=1)
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    spots = {1: [4], 2: [0, 8], 3: [0, 4, 8], 4: [0, 2, 6, 8], 5: [0, 2, 4, 6, 8]}
    inks, radius, parts = rng.permutation([0.0, 0.2, 0.4]), rng.uniform(0.17, 0.25), []
    for normal in range(3):
        plane = np.delete(edges, normal, axis=0)
        parts.append(Part(square @ plane + edges[normal], inks[normal]))
        for spot in spots[int(rng.integers(1, 6))]:
            circle = _circle(radius, 0.52 * (spot % 3 - 1), 0.52 * (spot // 3 - 1), 16)
            parts.append(Part(circle @ plane + edges[normal], 1.0))
    return parts


def _fish(rng: Rng) -> list[Part]:
    depth, tail = rng.uniform(0.6, 0.95), rng.uniform(0.28, 0.45)
    parts = [
        Part(np.array([[-0.55, 0], [-1.3, tail], [-1.1, 0], [-1.3, -tail]]), 0.6),
        Part(np.array([[0.25, depth * 0.3], [-0.2, depth * 0.78], [-0.45, depth * 0.15]]), 0.6),
        Part(np.array([[0.1, -depth * 0.3], [-0.2, -depth * 0.62], [-0.3, -depth * 0.15]]), 0.6),
        Part(_petal(1.8, depth, np.pi, -0.9, -0.35)),
    ]
    bow = np.linspace(-1, 1, 12)
    for band in range(int(rng.integers(1, 4))):
        x, reach = 0.33 - 0.3 * band, depth * (0.33 - 0.045 * band)
        path = np.stack([x + 0.12 * bow**2 - 0.12, reach * bow], axis=1)
        parts.append(Part(_ribbon(path, rng.uniform(0.05, 0.12)), 0.8))
    return [*parts, Part(_circle(0.1, 0.58, 0.08), 1.0), Part(_circle(0.045, 0.6, 0.08), 0.0)]


def _flower(rng: Rng) -> list[Part]:
    petals, heart = int(rng.integers(5, 9)), rng.uniform(0.24, 0.34)
    width, fullness = rng.uniform(3.6, 4.6) / petals, rng.uniform(0.4, 0.8)
    angles = np.arange(petals) * 2 * np.pi / petals
    bend, leaves = rng.uniform(-0.3, 0.3), rng.uniform(0.25, 0.8, 2)
    down = np.linspace(0, 1, 12)
    stem = np.stack([bend * down**2, -1.9 * down], axis=1)
    parts = [Part(_ribbon(stem, 0.13), 0.7)]
    for leaf, side in zip(leaves, (0, np.pi), strict=True):
        parts.append(Part(_petal(0.75, 0.36, side + leaf * np.cos(side), 0, 0.1) + stem[7], 0.7))
    parts += [Part(_petal(0.95, width, angle, 0.05, fullness)) for angle in angles]
    parts += [Part(_petal(0.6, width * 0.4, angle, 0.1, fullness), 0.4) for angle in angles]
    return [*parts, Part(_circle(heart), 1.0), Part(_circle(heart * 0.5), 0.7)]


def _gear(rng: Rng) -> list[Part]:
    teeth, root = int(rng.integers(8, 14)), rng.uniform(0.7, 0.8)
    steps = (np.arange(teeth)[:, None] + np.array([-0.3, -0.17, 0.17, 0.3])) * 2 * np.pi / teeth
    outline = _polar(np.tile([root, 1, 1, root], teeth), steps.ravel())
    hole = rng.uniform(0.2, 0.42)
    parts = [Part(outline), Part(_circle(root * 0.85), 0.35), Part(_circle(hole * 1.35), 1.0)]
    if rng.random() < 0.5:
        bolts = int(rng.integers(3, 7))
        ring = (hole * 1.35 + root * 0.85) / 2
        spots = _polar(ring, np.arange(bolts) * 2 * np.pi / bolts)
        parts += [Part(_circle(0.08, x, y), None) for x, y in spots]
    return [*parts, Part(_circle(hole), None)]


def _heart(rng: Rng) -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    outline = np.stack([16 * np.sin(t) ** 3, y * rng.uniform(0.9, 1.15) + 2], axis=1) / 17
    parts = [Part(outline)]
    for inset in rng.permutation([0.82, 0.68, 0.5])[: int(rng.integers(0, 4))]:
        parts.append(Part(outline * inset, float(rng.choice([0.0, 0.5, 1.0]))))
    return parts


def _honeycomb(rng: Rng) -> list[Part]:
    cells = [(q, r) for q in range(-2, 3) for r in range(-2, 3) if abs(q + r) <= 2]
    rim = [cell for cell in cells if max(abs(cell[0]), abs(cell[1]), abs(sum(cell))) == 2]
    lost = rng.permutation(len(rim))[: int(rng.integers(2, 7))]
    kept = [cell for cell in cells if cell not in [rim[i] for i in lost]]
    corners = np.pi / 6 + np.arange(6) * np.pi / 3
    wall = rng.uniform(0.7, 0.86)
    centres = [(0.4 * (q + r / 2), 0.4 * 0.866 * r) for q, r in kept]
    parts = [Part(_polar(0.24, corners, centre)) for centre in centres]
    inks = (None, 1.0, 0.6) if rng.random() < 0.5 else (1.0, 0.8, 0.6)
    for centre in centres:
        ink = inks[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]
        parts.append(Part(_polar(0.23 * wall, corners, centre), ink))
    return parts


def _leaf(rng: Rng) -> list[Part]:
    width, veins = rng.uniform(0.75, 1.15), int(rng.integers(4, 7))
    u = np.linspace(0, 1, 48)
    half = width / 2 * np.sin(np.pi * u ** rng.uniform(0.7, 1.0)) ** rng.uniform(0.9, 1.3)
    half *= 1 - rng.uniform(0, 0.14) * (u * 4 * veins % 1)  # a saw-toothed rim, or a smooth one
    x = 2 * u - 1
    outline = np.concatenate([np.stack([x, half], 1), np.stack([x, -half], 1)[::-1]])
    parts = [Part(outline), Part(_ribbon(np.array([[-1.4, 0.06], [-1, 0], [0.9, 0]]), 0.06), 1.0)]
    for vein in np.linspace(-0.75, 0.5, veins):
        reach = 0.85 * float(np.interp(vein + 0.25, x, half))
        for side in (-1, 1):
            path = np.array([[vein, 0], [vein + 0.14, side * reach * 0.6], [vein + 0.3, side * reach]])
            parts.append(Part(_ribbon(path, np.array([0.045, 0.035, 0.015])), 1.0))
    return parts


def _spiral(rng: Rng) -> list[Part]:
    turns = rng.uniform(2.2, 3.4)
    t = np.linspace(0.02, 1, 160)
    path = _polar(t, t * turns * 2 * np.pi)
    width = rng.uniform(0.5, 0.72) / turns * np.minimum(1, 8 * (1.005 - t)) ** 0.5
    core = _ribbon(path, width * rng.uniform(0.2, 0.5))
    return [Part(_ribbon(path, width)), Part(core, float(rng.choice([0.0, 0.5, 1.0])))]


def _star(rng: Rng) -> list[Part]:
    points, inner = int(rng.integers(5, 7)), rng.uniform(0.38, 0.5)
    angles = np.arange(2 * points) * np.pi / points
    corners = _polar(np.tile([1, inner], points), angles)
    parts = [Part(corners)]
    if rng.random() < 0.6:  # facets, as on a compass rose
        for i in range(0, 2 * points, 2):
            facet = np.array([[0, 0], corners[i], corners[i + 1]])
            parts.append(Part(facet, rng.uniform(0.4, 1.0) if i == 0 else parts[-1].ink))
    else:
        parts.append(Part(corners * rng.uniform(0.4, 0.7), float(rng.choice([0.5, 1.0]))))
    return parts


FORMS: dict[str, Callable[[Rng], list[Part]]] = {
    form.__name__.strip("_"): form
    for form in (_butterfly, _dice, _fish, _flower, _gear, _heart, _honeycomb, _leaf, _spiral, _star)
}
CLASSES = tuple(FORMS)


# --- Painting: colours are planes (3, H, W) of float32 in 0 to 255 ----------------------------------------


class Palette(NamedTuple):
    """RGB colours (3, 1, 1)."""

    ground: Array
    ground_pattern: Array
    figure: Array
    figure_pattern: Array
    ink: Array
    clutter: Array
    more_clutter: Array


def _palette(rng: Rng) -> Palette:
    """Harmonious colours: hues at fixed distances, in OKLCH (https://bottosson.github.io/posts/oklab/).

    Figure and ground, figure and ink differ in lightness, so that grey pictures can be told apart too.
    """
    hue = rng.uniform(0, 2 * np.pi)
    scheme = rng.permutation(rng.choice([(0, 0.5, -0.5), (0, 2.1, -2.1), (0, 3.1, 0.4)]))
    ground = rng.uniform(0.25, 0.95)
    figure = _apart(ground, rng.uniform(0.22, 0.5), rng)
    ink = _apart(figure, rng.uniform(0.25, 0.5), rng)
    light = np.array([ground, ground, figure, figure, ink, rng.uniform(0.3, 0.9), ink])
    light += rng.normal(0, 0.04, 7)
    hues = hue + scheme[[0, 0, 1, 1, 2, 2, 1]] + rng.normal(0, 0.25, 7)
    chroma = rng.uniform(0.02, [0.1, 0.1, 0.18, 0.18, 0.18, 0.12, 0.12])
    a, b = chroma * np.cos(hues), chroma * np.sin(hues)
    long = (light + 0.39634 * a + 0.21580 * b) ** 3
    medium = (light - 0.10556 * a - 0.06385 * b) ** 3
    short = (light - 0.08948 * a - 1.29149 * b) ** 3
    red = 4.07674 * long - 3.30771 * medium + 0.23097 * short
    green = -1.26844 * long + 2.60976 * medium - 0.34132 * short
    blue = -0.00420 * long - 0.70342 * medium + 1.70761 * short
    linear = np.clip(np.stack([red, green, blue], axis=1), 0, 1)
    return Palette(*(255 * linear ** (1 / 2.2)).astype(np.float32)[..., None, None])


def _apart(value: float, distance: float, rng: Rng) -> float:
    """A lightness `distance` away from `value`: lighter or darker by chance, where both have room."""
    up, down = value + distance <= 0.97, value - distance >= 0.15
    return value + distance if up and (not down or rng.random() < 0.5) else value - distance


def _mix(first: Array, second: Array, weight: Array) -> Array:
    """`first` where weight (H, W) is 0, `second` where it is 1."""
    return first + weight * (second - first)


def _resized(field: Array, size: tuple[int, int]) -> Array:
    return np.asarray(Image.fromarray(field).resize(size, Image.Resampling.BICUBIC))


def _soft(field: Array, radius: float) -> Array:
    """field (H, W) blurred. Pillow's own filters have but 8 bits, whose steps the relief would show."""
    height, width = field.shape
    step = max(1, 0.6 * radius)
    grid = _resized(field, (max(2, round(width / step)), max(2, round(height / step))))
    for _ in range(2):  # rows, then columns: without it the outline would show the grid's beads
        grid = np.pad(grid.T, ((1, 1), (0, 0)), mode="edge")
        grid = 0.25 * grid[:-2] + 0.5 * grid[1:-1] + 0.25 * grid[2:]
    return _resized(np.ascontiguousarray(grid), (width, height))


def _clouds(size: tuple[int, int], cell: float, rng: Rng) -> Array:
    """Smooth noise (H, W) in about 0 to 1, with features `cell` pixels wide."""
    shape = (max(2, round(size[1] / cell)), max(2, round(size[0] / cell)))
    return _resized(rng.random(shape, dtype=np.float32), size)


def _pattern(size: tuple[int, int], rng: Rng) -> Array:
    """A mixing weight (H, W) in 0 to 1: a ramp, clouds, stripes or checks."""
    x = np.arange(size[0], dtype=np.float32)
    y = np.arange(size[1], dtype=np.float32)[:, None]
    turn, period = rng.uniform(0, 2 * math.pi), rng.uniform(0.06, 0.3) * min(size)
    along = math.cos(turn) * x + math.sin(turn) * y
    kind = rng.choice(["ramp", "clouds", "stripes", "checks"], p=[0.35, 0.35, 0.2, 0.1])
    if kind == "ramp":
        return (along - along.min()) / (along.max() - along.min())
    if kind == "clouds":
        return np.clip(_clouds(size, 1.5 * period, rng), 0, 1)
    wave = np.sin(along * (2 * math.pi / period))
    if kind == "checks":
        across = math.cos(turn) * y - math.sin(turn) * x
        wave *= np.sin(across * (2 * math.pi / period))
    return np.clip(0.5 + wave * rng.uniform(0.6, 3), 0, 1)


def _rasterize(parts: list[Part], size: tuple[int, int]) -> tuple[Array, Array]:
    """Coverage and ink, both (H, W) in 0 to 1, of parts in pixels."""
    # Pillow draws hard edges: drawn twice as large and shrunk, they are smooth.
    canvas = (2 * size[0], 2 * size[1])
    coverage, ink = Image.new("L", canvas), Image.new("L", canvas)
    on_coverage, on_ink = ImageDraw.Draw(coverage), ImageDraw.Draw(ink)
    for part in parts:
        corners = (2 * part.points).ravel().tolist()
        on_coverage.polygon(corners, fill=0 if part.ink is None else 255)
        if part.ink is not None:
            on_ink.polygon(corners, fill=round(255 * part.ink))
    scale = np.float32(1 / 255)
    return np.asarray(coverage.reduce(2)) * scale, np.asarray(ink.reduce(2)) * scale


def _place(parts: list[Part], size: tuple[int, int], area: float, rng: Rng) -> list[Part]:
    """Parts in pixels: mirrored or not, turned, stretched, near the centre, and covering `area` (px²).

    Without the latter, thin forms would cover less than full ones, and a histogram could tell them apart.
    """
    mirror, spin = rng.choice([-1, 1]), rng.normal(0, 0.4)
    axis, stretch = rng.uniform(0, math.pi), rng.uniform(1, 1.25)
    # Stretched along a random axis: turned to it, and back upside down, as y points down in pixels.
    points = [_turned(part.points * (mirror, 1), spin + axis) for part in parts]
    points = [_turned(p * (stretch, -1 / stretch), axis) for p in points]
    corners = np.concatenate(points)
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    radius = float(np.hypot(*(corners - middle).T).max())
    unit = [(p - middle) / radius for p in points]
    trial = [Part(48 + 48 * u, part.ink) for u, part in zip(unit, parts, strict=True)]
    covered = float(_rasterize(trial, (96, 96))[0].mean()) * 4  # of a square of two radii
    reach = min(math.sqrt(area / covered), 0.54 * min(size))
    room = np.clip(0.4 * np.array(size) - 0.7 * reach, 0, 0.3 * min(size))
    centre = np.array(size) / 2 + room * rng.uniform(-1, 1, 2)
    return [Part(u * reach + centre, part.ink) for u, part in zip(unit, parts, strict=True)]


def _scatter(count: int, reach: float, within: tuple[float, float], rng: Rng) -> list[Part]:
    """Clutter: `count` discs, shards and sticks, at most `reach` in radius, anywhere `within`."""
    parts = []
    for _ in range(count):
        corners, flatness = int(rng.choice([3, 4, 5, 24])), float(rng.choice([0.15, 0.6, 1]))
        points = _circle(reach * rng.uniform(0.3, 1), corners=corners) * (1, flatness)
        parts.append(Part(_turned(points, rng.uniform(0, 7)) + rng.uniform(0, 1, 2) * within))
    return parts


def _paint_ground(size: tuple[int, int], palette: Palette, rng: Rng) -> Array:
    """What lies behind the object (3, H, W): a patterned ground, and clutter more or less in focus."""
    # At half the size: four times faster, and a ground may be a little soft.
    half, side = (size[0] // 2, size[1] // 2), min(size) / 2
    planes = _mix(palette.ground, palette.ground_pattern, _pattern(half, rng) * rng.uniform(0.1, 0.7))
    planes *= 1 + rng.uniform(0, 0.5) * (_clouds(half, 0.4 * side, rng) - 0.5)
    for colour, blur in ((palette.clutter, 0.04), (palette.more_clutter, 0.015), (palette.figure_pattern, 0)):
        parts = _scatter(int(rng.integers(0, 5)), rng.uniform(0.03, 0.18) * side, half, rng)
        mask = _soft(_rasterize(parts, half)[0], 1 + blur * side)
        planes = _mix(planes, 0.7 * colour + 0.3 * palette.ground, mask)
    return np.stack([_resized(plane, size) for plane in planes])


def _paint_object(planes: Array, parts: list[Part], side: float, palette: Palette, rng: Rng) -> None:
    """Paint parts (in pixels, covering side² of them) into planes, with shadow and relief."""
    thickness = side * rng.uniform(0.03, 0.12)
    # All happens in a window around the parts: less than half of the work.
    corners = np.concatenate([part.points for part in parts])
    margin = 2 * thickness + 2
    left, top = np.maximum(corners.min(axis=0) - margin, 0).astype(int)
    right, bottom = (corners.max(axis=0) + margin).astype(int)
    window = planes[:, top:bottom, left:right]
    size = window.shape[2], window.shape[1]
    coverage, ink = _rasterize([Part(part.points - (left, top), part.ink) for part in parts], size)

    lamp = rng.uniform(0, 2 * math.pi)
    lamp_x, lamp_y = math.cos(lamp), math.sin(lamp)
    away = (round(-lamp_y * thickness), round(-lamp_x * thickness))
    shadow = _soft(np.roll(coverage, away, axis=(0, 1)), 1 + thickness)
    shaded = window * (1 - rng.uniform(0, 0.7) * shadow)

    surface = _mix(palette.figure, palette.figure_pattern, _pattern(size, rng) * rng.uniform(0, 0.6))
    surface = _mix(surface, palette.ink, ink * rng.uniform(0.6, 1))
    # Light falls along the slope of a height that rises from the outline inward and a little with the ink.
    slope_y, slope_x = np.gradient(_soft(coverage, 1 + thickness) + 0.15 * _soft(ink, 2))
    relief = np.clip((slope_x * -lamp_x + slope_y * -lamp_y) * thickness, -0.6, 0.8)
    surface *= 1 + rng.uniform(0.3, 1.2) * relief
    window[:] = _mix(shaded, np.minimum(surface, 255), coverage)


def draw(label: int, rng: Rng) -> Image.Image:
    """A picture (RGB, sides of 200 to 500 pixels) of class `label`; all else is drawn from `rng`.

    The ranges are set so that 1,600 of them teach a small network about nine in ten, not all.
    """
    short = int(rng.integers(200, 361))
    long = min(500, round(short * math.exp(rng.uniform(0, 0.6))))
    size = (long, short) if rng.random() < 0.6 else (short, long)
    palette = _palette(rng)
    planes = _paint_ground(size, palette, rng)
    side = short * math.exp(rng.uniform(math.log(0.42), math.log(0.8)))
    parts = _place(FORMS[CLASSES[label]](rng), size, side**2, rng)
    _paint_object(planes, parts, side, palette, rng)
    if rng.random() < 0.25:  # something hides a part of it
        middle = parts[0].points.mean(axis=0) + rng.normal(0, 0.35 * side, 2)
        pieces = _scatter(int(rng.integers(1, 3)), 0.55 * side, (1, 1), rng)
        mask = _rasterize([Part(piece.points + middle) for piece in pieces], size)[0]
        planes = _mix(planes, palette.clutter, _soft(mask, 1 + 6 * rng.random()))
    # What a camera adds: uneven light, grain, and at times a lack of focus.
    planes *= 1 + rng.uniform(0, 0.7) * (_clouds(size, short, rng) - 0.5)
    planes += rng.standard_normal((size[1], size[0]), np.float32) * rng.uniform(1, 10)
    pixels = np.clip(planes, 0, 255).astype(np.uint8)
    picture = Image.merge("RGB", [Image.fromarray(plane) for plane in pixels])
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.BoxBlur(rng.uniform(0.002, 0.008) * short))
    return picture


# --- Files -------------------------------------------------------------------------------------------------


def _encode(picture: Image.Image, rng: Rng) -> bytes:
    """A JPEG as one camera or web site or another would have stored it."""
    if rng.random() < 0.03:
        picture = picture.convert("L")
    quality, progressive = int(rng.integers(75, 97)), bool(rng.random() < 0.12)
    sampling = "4:2:0" if rng.random() < 0.7 else "4:4:4"
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=sampling, progressive=progressive)
    return file.getvalue()


def _strange(kind: str, picture: Image.Image, jpeg: bytes) -> bytes:
    """What a strange file holds instead of the picture's JPEG."""
    half = jpeg[: len(jpeg) // 2]
    faulty = {
        "truncated": half,
        "empty": b"",
        "text": b"<html><head><title>404 Not Found</title></head></html>\n",
        "zeroed": bytes(len(jpeg)),
        "damaged": half + jpeg,  # a broken download that started over instead of going on
    }
    if kind in faulty:
        return faulty[kind]
    file = io.BytesIO()
    if kind == "png":
        picture.save(file, "PNG")
    else:
        picture.convert("CMYK").save(file, "JPEG", quality=90)
    return file.getvalue()


def _write(task: tuple[Path, int, int, int]) -> None:
    """Write the file of one (root, seed, label, index). The folders are there."""
    root, seed, label, index = task
    rng = np.random.default_rng([seed, label, index])
    picture = draw(label, rng)
    content = _encode(picture, rng)
    if index == STRANGE_INDEX[label]:
        content = _strange(STRANGE[label], picture, content)
    split = "val" if index % VAL_EVERY == VAL_EVERY - 1 else "train"
    name = CLASSES[label]
    (root / split / name / f"{name}_{index:05d}.JPEG").write_bytes(content)


def generate(
    out: Path, seed: int = 0, num_images: int = 2000, workers: int | None = None, progress: bool = True
) -> None:
    """Write the data set of `seed` to `out`, or return at once where it is already complete.

    Each class gets a tenth of the images, a fifth of them in val. Files are written to `<out>.partial`, which
    is renamed when all are there: an interrupted call leaves no `out`, and the next one starts over.

    Args:
        out: folder to make; an empty one may exist.
        seed: 0 or more.
        num_images: files in all, the strange ones included; at least 50.
        workers: processes; by default one a core, 8 at most, as more would mostly start.
        progress: count the images on stderr.

    Raises:
        ValueError: `out` holds something else, or an argument is out of its range.
    """
    if num_images < VAL_EVERY * len(CLASSES):
        raise ValueError(f"num_images is {num_images}: give at least {VAL_EVERY * len(CLASSES)}")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more")
    if workers is None:
        workers = min(os.cpu_count() or 1, 8)
    if workers < 1:
        raise ValueError(f"workers is {workers}: give at least 1")
    out = out.absolute()
    wanted = {"version": GENERATOR_VERSION, "seed": seed, "num_images": num_images}
    if _is_complete(out, wanted):
        return
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in ("train", "val"):
        for name in CLASSES:
            (partial / split / name).mkdir(parents=True)
    tasks = [(partial, seed, i % len(CLASSES), i // len(CLASSES)) for i in range(num_images)]
    for count, _ in enumerate(_write_all(tasks, workers), start=1):
        if progress and (count % 50 == 0 or count == num_images):
            end = "\n" if count == num_images else ""
            print(f"\rdrawing image {count:,} of {num_images:,}", end=end, file=sys.stderr, flush=True)
    (partial / DESCRIPTION).write_text(json.dumps({"generator": "data_prep.synthetic", **wanted}) + "\n")
    partial.replace(out)


def _write_all(tasks: list[tuple[Path, int, int, int]], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(_write, tasks)
        return
    # Spawned, not forked: the caller may have threads (torch, OpenMP), which do not survive a fork. Ctrl-C is
    # the caller's: it ends the map, and without the tracebacks of all workers.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        yield from pool.map(_write, tasks, chunksize=8)


def _is_complete(out: Path, wanted: dict[str, int]) -> bool:
    """Whether `out` holds the wanted data set; ValueError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / DESCRIPTION).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{out} holds something else than generated images: choose another --out") from None
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(
                f"{out} holds generated images of {key} {found.get(key)}, not {value}: "
                "delete it or choose another --out"
            )
    return True
