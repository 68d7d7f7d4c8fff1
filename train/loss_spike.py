"""Steps whose loss lies far above what the last ones had: counted, and left out where the recipe says so.

A batch of damaged labels or an exploding activation shows in the loss before it shows in the weights. The
rule looks at the mean loss over all ranks, so all of them come to the same conclusion, on the device: an
exponential moving average and variance of the loss, and a limit in standard deviations. A level that stays is
no spike: after MOST_IN_A_ROW of them (a phase that unfreezes, another resolution) the new level is taken for
the usual one.

Skipping such updates: Chowdhery et al., PaLM (2022), section 5.1, went back and left batches out by hand.
"""

from __future__ import annotations

import torch

from train.config import LossSpikeSection

DECAY = 0.98  # of the averages: some fifty steps
WARMUP_STEPS = 50
LEAST_DEVIATION = 0.05  # of the mean: where the loss hardly varies, little is no spike
MOST_IN_A_ROW = 3


class LossSpikes:
    """The rule and what it remembers.

    Attributes:
        num_spikes: since the start of the run, 0-dimensional on the device.
    """

    def __init__(self, config: LossSpikeSection, device: torch.device) -> None:
        self.skips = config.action == "skip"
        self._deviations = config.deviations
        # mean, variance, steps seen, spikes in a row; spikes in all
        self._state = torch.zeros(5, device=device, dtype=torch.float32)

    @property
    def num_spikes(self) -> torch.Tensor:
        return self._state[4]

    def look(self, loss: torch.Tensor, failed: torch.Tensor) -> torch.Tensor:
        """1.0 where this step is a spike, else 0.0; 0-dimensional on the device.

        Args:
            loss: mean over all ranks, 0-dimensional.
            failed: 1.0 where the step is skipped for another reason: it teaches nothing.
        """
        mean, variance, seen, in_a_row, in_all = self._state.unbind()
        deviation = torch.maximum(variance.sqrt(), LEAST_DEVIATION * mean.abs())
        is_good = failed == 0
        loss = torch.where(is_good, loss.float(), mean)
        is_high = (loss > mean + self._deviations * deviation) & (seen >= WARMUP_STEPS) & is_good
        is_spike = is_high & (in_a_row < MOST_IN_A_ROW)
        is_new_level = is_high & ~is_spike
        # Averages over the first steps as over all later ones: their weights sum to one.
        weight = torch.maximum(1 / (seen + 1), torch.full_like(seen, 1 - DECAY))
        difference = loss - mean
        new_mean = torch.where(is_new_level, loss, mean + weight * difference)
        new_variance = torch.where(is_new_level, variance, (1 - weight) * (variance + weight * difference**2))
        learns = is_good & ~is_spike
        self._state = torch.stack(
            [
                torch.where(learns, new_mean, mean),
                torch.where(learns, new_variance, variance),
                torch.where(is_new_level, torch.ones_like(seen), seen + learns.float()),
                torch.where(is_spike, in_a_row + 1, torch.where(learns, torch.zeros_like(seen), in_a_row)),
                in_all + is_spike.float(),
            ]
        )
        return is_spike.float()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"state": self._state}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._state = state["state"].to(self._state)
