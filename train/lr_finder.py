"""Learning-rate range test on torch-lr-finder, made safe under DDP.

The rate grows exponentially from `start_lr` to `end_lr` while the model trains; the loss falls, then
diverges. The library stops each rank on its own loss, which deadlocks DDP: here loss and stop are those of
all ranks, the primary chooses, and everything is put back as it was, also after a signal or an error.

The rule: smooth the loss (a Gaussian over neighbouring steps), take `fraction_of_minimum` of the rate at its
minimum. A loss that hardly fell, or whose minimum is at an edge, gives no answer, and says so. How far the
choice could have been another is estimated from the curve itself: from its even and odd steps alone, and
from the smoothed curve with its own noise dealt anew.

Example:
    >>> result = find_learning_rate(model, optimizer, loss_fn, loader, recipe.lr_finder, resolution=128, …)
    >>> result.choice, result.choice_low, result.choice_high, result.confidence
    (0.42, 0.31, 0.55, 'high')
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_lr_finder import LRFinder, TrainDataLoaderIter
from torch_lr_finder import lr_finder as library
from tqdm import tqdm

from data_prep.storage import write_atomically
from train.config import LrFinderSection
from train.data.batch import Batch
from train.data.loaders import Loader
from train.distributed import Ranks
from train.optim import set_learning_rate
from train.param_groups import freeze_statistics
from train.precision import build_autocast, build_scaler

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Confidence = Literal["high", "medium", "low"]

DIVERGENCE_FACTOR = 3.0  # of the smallest loss so far: beyond it there is nothing more to learn
SMOOTHING_STEPS = 2.5  # standard deviation of the Gaussian
LEAST_FALL = 0.03  # of the first loss: less is noise
NUM_RESAMPLES = 200
# Depth of the minimum in deviations of the noise, and high : low of the range of choices.
HIGH_DEPTH, LOW_DEPTH = 10.0, 4.0
HIGH_RATIO, LOW_RATIO = 2.5, 8.0


@dataclass(frozen=True)
class LrFinderResult:
    """What the range test found.

    Attributes:
        learning_rates, losses: the curve, losses averaged over ranks; rates are the head's, of which other
            parameter groups have their share.
        choice: the rate by the rule, or None.
        reason: how it was chosen, or why not.
        choice_low, choice_high: the range within which the choice moves with the noise, or None.
        confidence, confidence_reason: how much to make of the choice, and why.
    """

    learning_rates: list[float]
    losses: list[float]
    choice: float | None
    reason: str
    choice_low: float | None = None
    choice_high: float | None = None
    confidence: Confidence = "low"
    confidence_reason: str = ""


def find_learning_rate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFunction,
    loader: Loader,
    config: LrFinderSection,
    *,
    resolution: int,
    grad_accum_steps: int,
    precision: str,
    ranks: Ranks,
    wants_to_stop: Callable[[], bool] = lambda: False,
    clip: Callable[[], None] | None = None,
) -> LrFinderResult | None:
    """Run the test on all ranks; the result is the primary's on every one, None if any rank was to stop.

    Weights, buffers, modes and generators come back bit for bit, however the test ends; gradients are None.

    Args:
        model: from uint8 images to logits, wrapped for DDP.
        optimizer: the training's own may be given: the test works with a copy of it.
        loss_fn: from logits (float32) and labels to a mean over samples.
        clip: called between unscaled gradients and each step, for a test that clips as the training does.
    """
    finder = _ReducedFinder(
        model, _twin(optimizer), loss_fn, ranks=ranks, precision=precision, stop=wants_to_stop, clip=clip
    )
    batches = _EndlessBatches(loader, resolution)
    with _preserved(model, ranks.device), _quiet(ranks), contextlib.closing(batches):
        with contextlib.suppress(_EndOfTest):
            finder.range_test(
                batches,
                start_lr=config.start_lr,
                end_lr=config.end_lr,
                num_iter=config.num_steps,
                smooth_f=0,
                diverge_th=DIVERGENCE_FACTOR,
                accumulation_steps=grad_accum_steps,
            )
    if finder.stopped:
        return None
    losses = finder.history["loss"]
    return ranks.broadcast(judge(finder.history["lr"][: len(losses)], losses, config.fraction_of_minimum))


def judge(learning_rates: list[float], losses: list[float], fraction_of_minimum: float) -> LrFinderResult:
    """Choice, range and confidence for a curve of finite losses."""
    choice, reason = choose_learning_rate(learning_rates, losses, fraction_of_minimum)
    if choice is None:
        return LrFinderResult(learning_rates, losses, None, reason, confidence_reason="there is no choice")
    smooth = smooth_losses(losses)
    lowest = int(np.argmin(smooth))
    residuals = (np.asarray(losses) - smooth)[: max(lowest + 1, 10)]  # what diverges later is no noise
    low, high = _choice_range(learning_rates, losses, smooth, residuals, fraction_of_minimum)
    depth = float((smooth[0] - smooth[lowest]) / max(residuals.std(), 1e-12))
    confidence, why = _confidence(depth, high / low, at_edge=lowest == len(losses) - 1)
    return LrFinderResult(learning_rates, losses, choice, reason, low, high, confidence, why)


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


def _choice_range(
    learning_rates: list[float],
    losses: list[float],
    smooth: np.ndarray,
    residuals: np.ndarray,
    fraction_of_minimum: float,
) -> tuple[float, float]:
    """Lowest and highest choice: by the rule, by every second point, and nine tenths of the resampled curves.

    The generator is seeded, so that a curve has one range.
    """
    choices = [learning_rates[int(np.argmin(smooth))]]
    for start in (0, 1):
        half = smooth_losses(losses[start::2], SMOOTHING_STEPS / 2)
        choices.append(learning_rates[start::2][int(np.argmin(half))])
    generator = np.random.default_rng(0)
    noise = generator.choice(residuals, (NUM_RESAMPLES, len(losses)))
    lowest = np.argmin((smooth + noise) @ _smoothing_weights(len(losses), SMOOTHING_STEPS).T, axis=1)
    choices += np.quantile(np.asarray(learning_rates)[lowest], [0.05, 0.95]).tolist()
    return min(choices) * fraction_of_minimum, max(choices) * fraction_of_minimum


def _confidence(depth: float, ratio: float, at_edge: bool) -> tuple[Confidence, str]:
    """How sure a choice is, and why, in words.

    Args:
        depth: of the minimum, in standard deviations of the loss about the smoothed curve.
        ratio: of the highest to the lowest choice.
    """
    facts = f"the fall is {depth:.0f} times the noise, and the choice moves within a factor of {ratio:.2g}"
    if at_edge:
        return "low", f"the minimum is at the last rate of the test; {facts}"
    if depth < LOW_DEPTH or ratio > LOW_RATIO:
        return "low", facts
    return ("high" if depth >= HIGH_DEPTH and ratio <= HIGH_RATIO else "medium"), facts


def smooth_losses(losses: list[float], width: float = SMOOTHING_STEPS) -> np.ndarray:
    """Gaussian-weighted mean of neighbouring steps, weights cut at the ends: shape (num_steps,)."""
    return _smoothing_weights(len(losses), width) @ np.asarray(losses)


def _smoothing_weights(num_steps: int, width: float) -> np.ndarray:
    steps = np.arange(num_steps)
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / width) ** 2)
    return weights / weights.sum(1, keepdims=True)


def save_result(result: LrFinderResult, folder: Path, chosen: float) -> None:
    """Write `lr_finder.json` and `lr_finder.png`; `chosen` is the rate that the run trains with."""
    content = asdict(result) | {"trained_with": chosen}
    write_atomically(folder / "lr_finder.json", (json.dumps(content, indent=1) + "\n").encode())
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(result.learning_rates, result.losses, color="0.75", lw=1, label="loss of a step")
    if result.losses:
        smooth = smooth_losses(result.losses)
        axes.plot(result.learning_rates, smooth, color="#0072B2", lw=2, label="smoothed")
        low, high = min(result.losses), result.losses[0]
        axes.set_ylim(low - 0.15 * (high - low + 0.1), high + 0.6 * (high - low + 0.1))
    if result.choice_low is not None and result.choice_high is not None:
        label = f"range of the choice: {result.choice_low:.2g}–{result.choice_high:.2g} ({result.confidence})"
        axes.axvspan(result.choice_low, result.choice_high, color="#E69F00", alpha=0.18, lw=0, label=label)
    axes.axvline(chosen, color="#D55E00", lw=2, ls="--", label=f"peak_lr of this run: {chosen:.3g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="Learning-rate finder")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(folder / "lr_finder.png", buffer.getvalue())


def _twin(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy that works on the same parameters, with its own state, groups and patched methods.

    Restoring the optimizer itself afterwards would have to undo what a scheduler does to it, a wrapped
    `step` among it, and what classes keep besides `state`, which `state_dict` leaves out.
    """
    twin = object.__new__(type(optimizer))
    known: dict[int, object] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    known[id(optimizer)] = twin
    twin.__dict__.update(copy.deepcopy(optimizer.__dict__, known))
    return twin


@contextlib.contextmanager
def _preserved(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back weights, buffers (those outside state_dict, too), modes and all generators at the end."""
    parameters = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weights, requires_grad in parameters:
                parameter.copy_(weights)
                parameter.requires_grad = requires_grad
                parameter.grad = None
            for module, name, buffer, content in buffers:
                setattr(module, name, buffer.copy_(content))  # a module may have put another in its place
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)


@contextlib.contextmanager
def _quiet(ranks: Ranks) -> Iterator[None]:
    """The library draws its bar and speaks on every rank; only the primary draws, where there is a terminal."""
    theirs = library.tqdm
    library.tqdm = functools.partial(
        tqdm,
        desc="learning-rate finder",
        unit="step",
        leave=False,
        disable=None if ranks.is_primary else True,  # None: not where there is no terminal
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        library.tqdm = theirs


class _EndOfTest(Exception):
    """Ends the test before a NaN gets into its history, where argmin would choose it; or on a signal."""


class _ReducedFinder(LRFinder):
    """The library's test with a step of ours: as the training does it, and alike on all ranks."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        *,
        ranks: Ranks,
        precision: str,
        stop: Callable[[], bool],
        clip: Callable[[], None] | None,
    ) -> None:
        super().__init__(model, optimizer, loss_fn, device=ranks.device)
        self.state_cacher.cached.clear()  # a second copy of the weights; `_preserved` has one
        precision = precision if precision in ("bf16", "fp16") else "fp32"  # tf32 is no autocast
        self._autocast = build_autocast(precision, ranks.device)
        self._scaler = build_scaler(precision, ranks.device)
        self._ranks, self._stop, self._clip = ranks, stop, clip
        self.stopped = False

    def _train_batch(self, train_iter, accumulation_steps: int, non_blocking_transfer: bool = True) -> float:
        self.model.train()
        freeze_statistics(self.model)
        # The library gives all groups the same rate; each is to have its share of it.
        set_learning_rate(self.optimizer, self.optimizer.param_groups[0]["lr"], None)
        total = torch.zeros((), device=self._ranks.device)
        for position in range(accumulation_steps):
            images, labels = next(train_iter)
            images = images.to(self.device, non_blocking=non_blocking_transfer)
            labels = labels.to(self.device, non_blocking=non_blocking_transfer)
            with self._without_reduction(position < accumulation_steps - 1):
                with self._autocast:
                    logits = self.model(images)
                logits = logits.float() if isinstance(logits, torch.Tensor) else logits
                loss = self.criterion(logits, labels) / accumulation_steps
                self._scaler.scale(loss).backward()
            total += loss.detach()
        if self._clip is not None:
            self._scaler.unscale_(self.optimizer)
            self._clip()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.model.zero_grad(set_to_none=True)
        loss_sum, num_stopping = self._ranks.sum([total.item(), float(self._stop())])
        self.stopped = num_stopping > 0
        if self.stopped or not math.isfinite(loss_sum):
            raise _EndOfTest
        return loss_sum / self._ranks.world_size

    @contextlib.contextmanager
    def _without_reduction(self, skip: bool) -> Iterator[None]:
        """DDP reduces gradients with the last micro-batch of a step only."""
        with contextlib.ExitStack() as stack:
            for module in self.model.modules():
                if skip and isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
            yield


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
