"""Corruptions that mix or move pixels: blurs, warps, and weather that is drawn into the image.

Each takes an image, float32 (side, side, 3) in [0, 1], a generator and its parameters (of ImageNet-C, whose
lengths are in pixels of a 224-pixel image and are scaled here to the image's own side), and returns an image
of the same shape, not yet clipped.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import fft, ndimage, signal
from torch.nn import functional

from evaluation.robustness.pixel_changes import Pixels

REFERENCE_SIDE = 224
GREY = np.array([0.299, 0.587, 0.114], np.float32)
SUPERSAMPLING = 8  # points a pixel and axis, in which the share of a disk in a pixel is counted


def defocus_blur(image: Pixels, _rng: Generator, radius: float) -> Pixels:
    return _convolve(image, _disk(radius * _scale(image)))


def motion_blur(image: Pixels, rng: Generator, radius: float, sigma: float) -> Pixels:
    """A trail to one side, at an angle from -45 to 45 degrees."""
    scale = _scale(image)
    return _convolve(image, _trail(radius * scale, sigma * scale, rng.uniform(-45, 45)))


def zoom_blur(image: Pixels, _rng: Generator, end: float, step: float) -> Pixels:
    """The mean of the image and of enlarged ones, from 1 to `end` times; without steps, as a lens does it."""
    factors = np.arange(1, end, step)
    lines = torch.linspace(-1, 1, image.shape[0])
    total = image.copy()
    for factor in factors:
        line = lines / float(factor)
        total += _sample(image, *torch.meshgrid(line, line, indexing="ij"))
    return total / np.float32(len(factors) + 1)


def glass_blur(image: Pixels, rng: Generator, sigma: float, distance: int, rounds: int) -> Pixels:
    """Blur, take pixels from places nearby, blur.

    ImageNet-C exchanges neighbours one after the other, image by image in Python; here every pixel is taken
    from a place drawn for it, which moves them as far. A distance below a pixel would move nothing.
    """
    side, scale = image.shape[0], _scale(image)
    blurred = ndimage.gaussian_filter(image, (sigma * scale, sigma * scale, 0), mode="nearest")
    reach = max(1, round(distance * scale))
    rows, columns = np.mgrid[0:side, 0:side]
    for _ in range(rounds):
        moves = rng.integers(-reach, reach, size=(2, side, side))
        blurred = blurred[np.clip(rows + moves[0], 0, side - 1), np.clip(columns + moves[1], 0, side - 1)]
    return ndimage.gaussian_filter(blurred, (sigma * scale, sigma * scale, 0), mode="nearest")


def elastic(image: Pixels, rng: Generator, shift: float, sigma: float, affine: float) -> Pixels:
    """A random affine map, then displacements smooth over `sigma` pixels."""
    side, scale = image.shape[0], _scale(image)
    middle, reach = side // 2, side // 3
    corners = middle + reach * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = corners + rng.uniform(-affine * scale, affine * scale, size=corners.shape)
    # The map from the result's (x, y, 1) to the image's (x, y).
    inverse = np.linalg.solve(np.c_[moved, np.ones(3)], corners)
    # Smooth noise has an amplitude of 1 / sigma, so displacements fall with the scale, as they should, only
    # where the factor falls with its square.
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float64)
    columns += _smooth_noise(rng, side, sigma * scale) * (shift * scale**2)
    rows += _smooth_noise(rng, side, sigma * scale) * (shift * scale**2)
    x, y = (inverse[0, axis] * columns + inverse[1, axis] * rows + inverse[2, axis] for axis in (0, 1))
    return _sample(image, *(torch.from_numpy(2 * place / (side - 1) - 1).float() for place in (y, x)))


def fog(image: Pixels, rng: Generator, density: float, decay: float) -> Pixels:
    brightest = float(image.max())
    side = image.shape[0]
    layer = _plasma(rng, 2 ** math.ceil(math.log2(side)), decay)[:side, :side, None]
    return (image + np.float32(density) * layer) * np.float32(brightest / (brightest + density))


def snow(
    image: Pixels,
    rng: Generator,
    mean: float,
    deviation: float,
    flake: float,
    threshold: float,
    radius: float,
    sigma: float,
    kept: float,
) -> Pixels:
    """Whiten the image and draw flakes of `flake` pixels, with trails, falling in two directions."""
    side, scale = image.shape[0], _scale(image)
    noise = mean + deviation * rng.standard_normal((side, side), dtype=np.float32)
    line = torch.linspace(-1, 1, side) / max(1.0, flake * scale)
    layer = _sample(noise[..., None], *torch.meshgrid(line, line, indexing="ij"))
    layer = np.where(layer < threshold, 0, np.clip(layer, 0, 1))
    layer = _convolve(layer, _trail(radius * scale, sigma * scale, rng.uniform(-135, -45)))
    white = np.maximum(image, (image @ GREY)[..., None] * 1.5 + 0.5)
    return np.float32(kept) * image + np.float32(1 - kept) * white + layer + np.rot90(layer, 2)


def _scale(image: Pixels) -> float:
    return image.shape[0] / REFERENCE_SIDE


def _convolve(image: Pixels, kernel: NDArray[np.float32]) -> Pixels:
    """The image under an odd, square kernel, reflected at its borders; by FFT, as kernels are large."""
    pad = kernel.shape[0] // 2
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    return signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


def _disk(radius: float) -> NDArray[np.float32]:
    """A disk with sum 1, each pixel by the share of it that is covered."""
    reach = math.ceil(radius + 0.5)
    points = (np.arange((2 * reach + 1) * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - reach - 0.5
    inside = points[:, None] ** 2 + points[None] ** 2 <= radius**2
    shares = inside.reshape(2 * reach + 1, SUPERSAMPLING, 2 * reach + 1, SUPERSAMPLING).sum((1, 3))
    return (shares / shares.sum()).astype(np.float32)


def _trail(radius: float, sigma: float, degrees: float) -> NDArray[np.float32]:
    """Half a Gaussian along a line from the centre, `2 radius + 1` pixels long, with sum 1."""
    distances = np.arange(0, 2 * radius + 1, 0.25)
    # Nothing is left beyond four deviations; a small kernel is all that is needed for the rest.
    distances = distances[distances <= max(4 * sigma, 1)]
    weights = np.exp(-(distances**2) / (2 * sigma**2))
    x = distances * math.cos(math.radians(degrees))
    y = distances * math.sin(math.radians(degrees))
    reach = math.ceil(distances[-1]) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    for down, across in ((0, 0), (0, 1), (1, 0), (1, 1)):  # each point to the four pixels around it
        share = np.abs(1 - down - (y - top)) * np.abs(1 - across - (x - left))
        np.add.at(kernel, (reach + top + down, reach + left + across), weights * share)
    return (kernel / kernel.sum()).astype(np.float32)


def _smooth_noise(rng: Generator, side: int, sigma: float) -> NDArray[np.float64]:
    """Uniform noise in [-1, 1] under a Gaussian of any width, reflected at the borders: (side, side).

    In the cosine domain, where a Gaussian of 170 pixels costs as much as one of two.
    """
    damping = np.exp(-0.5 * (np.pi * np.arange(side) * sigma / side) ** 2)
    waves = fft.dctn(rng.uniform(-1, 1, (side, side)), norm="ortho")
    return fft.idctn(waves * damping[:, None] * damping, norm="ortho")


def _plasma(rng: Generator, side: int, decay: float) -> NDArray[np.float32]:
    """A fractal cloud in [0, 1], (side, side) with a power of two, by the diamond-square algorithm.

    Fournier, Fussell and Carpenter, "Computer rendering of stochastic models", 1982. As in ImageNet-C, the
    noise falls with the square of `decay` from step to step, and the map is a torus.
    """
    cloud = np.zeros((side, side))
    step, amplitude = side, 100.0**2

    def noisy_mean(total: NDArray[np.float64]) -> NDArray[np.float64]:
        return total / 4 + amplitude * rng.uniform(-1, 1, total.shape)

    while step >= 2:
        half = step // 2
        corners = cloud[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        cloud[half::step, half::step] = noisy_mean(pairs + np.roll(pairs, -1, 1))
        centres, corners = cloud[half::step, half::step], cloud[::step, ::step]
        above = centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1)
        beside = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0)
        cloud[::step, half::step] = noisy_mean(above)
        cloud[half::step, ::step] = noisy_mean(beside)
        step, amplitude = half, amplitude / decay**2
    cloud -= cloud.min()
    return (cloud / cloud.max()).astype(np.float32)


def _sample(image: Pixels, rows: torch.Tensor, columns: torch.Tensor) -> Pixels:
    """The image at places from -1 to 1, float32 (side, side) each, linearly between pixels."""
    grid = torch.stack([columns, rows], dim=-1)[None]
    channels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    sampled = functional.grid_sample(channels, grid, padding_mode="reflection", align_corners=True)
    return sampled[0].permute(1, 2, 0).numpy()
