"""Forms of the embedded data set: parts in units of about the form's radius, y upward, painted in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rng = np.random.Generator


class Part(NamedTuple):
    """A filled polygon, points (N, 2). Ink goes from 0, the object's own colours, to 1; None is a hole."""

    points: Array
    ink: float | None = 0.0


def _polar(radius: Array | float, angle: Array, centre: tuple[float, float] = (0, 0)) -> Array:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1) + np.asarray(centre)


def circle(radius: float, x: float = 0, y: float = 0, corners: int = 32) -> Array:
    return _polar(radius, np.linspace(0, 2 * np.pi, corners, endpoint=False), (x, y))


def turned(points: Array, angle: float) -> Array:
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = points[:, 0], points[:, 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=1)


def _petal(length: float, width: float, angle: float, base: float = 0, fullness: float = 0.5) -> Array:
    """A drop from `base` to `base + length` along `angle`; fullness < 0 moves its belly inward."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    along = (1 - np.cos(turn)) / 2
    belly = along**fullness if fullness > 0 else (1 - along) ** -fullness
    return turned(np.stack([base + length * along, width / 2 * np.sin(turn) * belly], 1), angle)


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
            Part(circle(spot, *(0.72 * length * np.array([np.cos(angle), np.sin(angle)]))), 1.0),
        ]
        parts += wing + [Part(p.points * (-1, 1), p.ink) for p in wing]
    for side in (-1, 1):
        bow = np.linspace(0, 1, 12)
        path = np.stack([side * 0.3 * bow**2, 0.4 + 0.45 * bow], axis=1)
        parts.append(Part(_ribbon(path, 0.045), 1.0))
    return [*parts, Part(circle(1.0) * (0.08, 0.5), 1.0)]


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
            pip = circle(radius, 0.52 * (spot % 3 - 1), 0.52 * (spot // 3 - 1), 16)
            parts.append(Part(pip @ plane + edges[normal], 1.0))
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
    return [*parts, Part(circle(0.1, 0.58, 0.08), 1.0), Part(circle(0.045, 0.6, 0.08), 0.0)]


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
    return [*parts, Part(circle(heart), 1.0), Part(circle(heart * 0.5), 0.7)]


def _gear(rng: Rng) -> list[Part]:
    teeth, root = int(rng.integers(8, 14)), rng.uniform(0.7, 0.8)
    steps = (np.arange(teeth)[:, None] + np.array([-0.3, -0.17, 0.17, 0.3])) * 2 * np.pi / teeth
    outline = _polar(np.tile([root, 1, 1, root], teeth), steps.ravel())
    hole = rng.uniform(0.2, 0.42)
    parts = [Part(outline), Part(circle(root * 0.85), 0.35), Part(circle(hole * 1.35), 1.0)]
    if rng.random() < 0.5:
        bolts = int(rng.integers(3, 7))
        ring = (hole * 1.35 + root * 0.85) / 2
        spots = _polar(ring, np.arange(bolts) * 2 * np.pi / bolts)
        parts += [Part(circle(0.08, x, y), None) for x, y in spots]
    return [*parts, Part(circle(hole), None)]


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
