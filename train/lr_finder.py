"""Learning-rate range test on torch-lr-finder, made safe under DDP.

The rate grows exponentially from `start_lr` to `end_lr` while the model trains; the loss falls, then
diverges. The library stops each rank on its own loss, which deadlocks DDP: here loss and stop are those of
all ranks, the primary chooses, and everything is put back as it was.

The rule: smooth the loss (a Gaussian over neighbouring steps), take `fraction_of_minimum` of the rate at its
minimum. A loss that hardly fell, or whose minimum is at an edge, gives no answer, and says so.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch_lr_finder import LRFinder, TrainDataLoaderIter
from torch_lr_finder import lr_finder as library
from tqdm import tqdm

from data_prep.storage import write_atomically
from train.config import LrFinderSection
from train.data.batch import Batch
from train.data.loaders import Loader
from train.distributed import Ranks
from train.precision import DTYPES

DIVERGENCE_FACTOR = 3.0  # of the smallest loss so far: beyond it there is nothing more to learn
SMOOTHING_STEPS = 2.5  # standard deviation of the Gaussian
LEAST_FALL = 0.03  # of the first loss: less is noise


@dataclass(frozen=True)
class LrFinderResult:
    """What the range test found.

    Attributes:
        learning_rates, losses: the curve, losses averaged over ranks.
        choice: the rate by the rule, or None.
        reason: how it was chosen, or why not.
    """

    learning_rates: list[float]
    losses: list[float]
    choice: float | None
    reason: str


def find_learning_rate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    loader: Loader,
    config: LrFinderSection,
    *,
    resolution: int,
    grad_accum_steps: int,
    precision: str,
    ranks: Ranks,
    wants_to_stop: Callable[[], bool] = lambda: False,
) -> LrFinderResult | None:
    """Run the test on all ranks; the result is the primary's on every one, None if any rank was to stop.

    Args:
        model: from uint8 images to logits, wrapped for DDP. Its weights and buffers are put back.
        optimizer: used up by the test; build another one for the training.
    """
    random_state = torch.get_rng_state()
    finder = _ReducedFinder(
        ranks,
        wants_to_stop,
        model,
        optimizer,
        criterion,
        device=ranks.device,
        amp_backend=None if precision == "fp32" else "torch",
        amp_config={"device_type": ranks.device.type, "dtype": DTYPES[precision]},
        grad_scaler=torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16"),
    )
    batches = _EndlessBatches(loader, resolution)
    # The library draws its bar and speaks on every rank; only the primary shall.
    library.tqdm = functools.partial(
        tqdm,
        desc="learning-rate finder",
        unit="step",
        leave=False,
        disable=None if ranks.is_primary else True,  # None: not where there is no terminal
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(_EndOfTest):
        finder.range_test(
            batches,
            start_lr=config.start_lr,
            end_lr=config.end_lr,
            num_iter=config.num_steps,
            smooth_f=0,
            diverge_th=DIVERGENCE_FACTOR,
            accumulation_steps=grad_accum_steps,
        )
    batches.close()
    if finder.stopped:
        return None
    finder.reset()
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(random_state)
    rates, losses = finder.history["lr"], finder.history["loss"]
    choice, reason = choose_learning_rate(rates[: len(losses)], losses, config.fraction_of_minimum)
    return ranks.broadcast(LrFinderResult(rates[: len(losses)], losses, choice, reason))


def choose_learning_rate(
    learning_rates: list[float], losses: list[float], fraction_of_minimum: float
) -> tuple[float | None, str]:
    """Apply the module's rule to a curve of finite losses; the rate or None, and the reason."""
    if len(losses) < 10:
        return None, f"the loss diverged after {len(losses)} steps: set lr_finder.start_lr lower"
    smooth = smooth_losses(losses)
    lowest = int(np.argmin(smooth))
    fall = (smooth[0] - smooth[lowest]) / abs(smooth[0])
    if fall < LEAST_FALL:
        return None, f"no clear minimum: the loss fell by {fall:.1%} only"
    if lowest == 0:
        return None, "no clear minimum: the loss was lowest at the first rate"
    choice = learning_rates[lowest] * fraction_of_minimum
    reason = f"{fraction_of_minimum:g} × the rate of the lowest loss ({learning_rates[lowest]:.3g})"
    if lowest == len(losses) - 1:
        reason += "; the loss was still falling at the end, so more may be better"
    return choice, f"{reason}; the loss fell by {fall:.0%}"


def smooth_losses(losses: list[float]) -> np.ndarray:
    """Gaussian-weighted mean of neighbouring steps, weights cut at the ends: shape (num_steps,)."""
    steps = np.arange(len(losses))
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / SMOOTHING_STEPS) ** 2)
    return weights @ np.asarray(losses) / weights.sum(1)


def save_result(result: LrFinderResult, folder: Path, chosen: float) -> None:
    """Write `lr_finder.json` and `lr_finder.png`; `chosen` is the rate that the run trains with."""
    content = asdict(result) | {"trained_with": chosen}
    write_atomically(folder / "lr_finder.json", (json.dumps(content, indent=1) + "\n").encode())
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(result.learning_rates, result.losses, color="0.75", lw=1, label="loss of a step")
    if result.losses:
        axes.plot(
            result.learning_rates, smooth_losses(result.losses), color="#0072B2", lw=2, label="smoothed"
        )
        low, high = min(result.losses), result.losses[0]
        axes.set_ylim(low - 0.15 * (high - low + 0.1), high + 0.6 * (high - low + 0.1))
    axes.axvline(chosen, color="#D55E00", lw=2, ls="--", label=f"peak_lr of this run: {chosen:.3g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="Learning-rate finder")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(folder / "lr_finder.png", buffer.getvalue())


class _EndOfTest(Exception):
    """Ends the test before a NaN gets into its history, where argmin would choose it; or on a signal."""


class _ReducedFinder(LRFinder):
    def __init__(self, ranks: Ranks, wants_to_stop: Callable[[], bool], *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._ranks = ranks
        self._wants_to_stop = wants_to_stop
        self.stopped = False

    def _train_batch(self, *args, **kwargs) -> float:
        loss = super()._train_batch(*args, **kwargs)
        total, num_stopping = self._ranks.sum([loss, float(self._wants_to_stop())])
        self.stopped = num_stopping > 0
        if self.stopped or not math.isfinite(total):
            raise _EndOfTest
        return total / self._ranks.world_size


class _EndlessBatches(TrainDataLoaderIter):
    """Our loader as the library wants one, epoch after epoch."""

    def __init__(self, loader: Loader, resolution: int) -> None:
        self._batches = self._endless(loader, resolution)

    @staticmethod
    def _endless(loader: Loader, resolution: int) -> Iterator[Batch]:
        epoch = 0
        while True:
            yield from loader.epoch(epoch, resolution=resolution)
            epoch += 1

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = next(self._batches)
        return batch.images, batch.labels

    def close(self) -> None:
        self._batches.close()  # type: ignore[attr-defined]
