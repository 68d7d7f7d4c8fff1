"""Learning-rate range test on torch-lr-finder, made safe under DDP.

The rate grows exponentially from `start_lr` to `end_lr` while the model trains; the loss falls, then
diverges. The library stops each rank on its own loss, which deadlocks DDP: here loss and stop are those of
all ranks, the primary chooses, and everything is put back as it was, also after a signal or an error.

What the curve says is in `train.lr_curve`.

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
import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_lr_finder import LRFinder, TrainDataLoaderIter
from torch_lr_finder import lr_finder as library
from tqdm import tqdm

from train.config import LrFinderSection
from train.data.batch import Batch
from train.data.loaders import Loader
from train.distributed import Ranks
from train.lr_curve import LrFinderResult, choose_learning_rate, judge, save_result, smooth_losses
from train.optim import set_learning_rate
from train.param_groups import freeze_statistics
from train.precision import build_autocast, build_scaler

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

__all__ = ["LrFinderResult", "choose_learning_rate", "find_learning_rate", "save_result", "smooth_losses"]

DIVERGENCE_FACTOR = 3.0  # of the smallest loss so far: beyond it there is nothing more to learn


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
    with (
        _preserved(model, ranks.device),
        _quiet(ranks),
        contextlib.closing(batches),
        contextlib.suppress(_EndOfTest),
    ):
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
    """The library draws its bar and speaks on every rank; only the primary shall."""
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
