"""Painting of the embedded data set: colours are planes (3, H, W) of float32 in 0 to 255."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_prep.synthetic.forms import CLASSES, FORMS, Array, Part, Rng, circle, turned


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
    points = [turned(part.points * (mirror, 1), spin + axis) for part in parts]
    points = [turned(p * (stretch, -1 / stretch), axis) for p in points]
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
        points = circle(reach * rng.uniform(0.3, 1), corners=corners) * (1, flatness)
        parts.append(Part(turned(points, rng.uniform(0, 7)) + rng.uniform(0, 1, 2) * within))
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
