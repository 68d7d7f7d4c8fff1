"""The random numbers of one batch: drawn on the host from a generator of their own, copied without waiting.

Drawn on the host, they are known there: which image gets which operation costs the device no round trip.
"""

from __future__ import annotations

import hashlib

import torch


class Draws:
    """Random numbers for the images of a batch; global generators are left alone.

    Args:
        seed: any whole number; equal numbers give equal draws.
        device: where `send` copies to.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        # torch's generator on the CPU looks at the lower 32 bits only, so a step number further up would be
        # lost, and neighbouring seeds would start in neighbouring states: a hash spreads all of the number.
        digest = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
        self._generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        self._device = device

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """float64 on the host, from low (included) to high."""
        unit = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return low + (high - low) * unit

    def integers(self, count: int, high: int) -> torch.Tensor:
        """int64 on the host, shape (count,), from 0 to high - 1."""
        return torch.randint(high, (count,), generator=self._generator)

    def permutation(self, count: int) -> torch.Tensor:
        """int64 on the host, shape (count,): 0 to count - 1 in random order."""
        return torch.randperm(count, generator=self._generator)

    def beta(self, count: int, alpha: float) -> torch.Tensor:
        """Beta(alpha, alpha) as the share of one of two gamma variates: float64 on the host, shape (count,).

        Taken as logarithms (gamma(alpha) = gamma(alpha + 1) * uniform ** (1 / alpha); Marsaglia & Tsang,
        2000, section 8): for small alpha both variates would underflow to zero.
        """
        shape = torch.full((2, count), alpha + 1, dtype=torch.float64)
        logarithms = torch._standard_gamma(shape, generator=self._generator).log()
        logarithms += (1 - self.uniform(2, count)).log() / alpha  # 1 - u: never zero
        return torch.sigmoid(logarithms[0] - logarithms[1])

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """Copy to the device; float64 becomes float32. The host does not wait."""
        if values.dtype == torch.float64:
            values = values.float()
        return values.to(self._device, non_blocking=True)
