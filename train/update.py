"""The update of a step: unscale, clip, agree that all is finite, and apply it, or skip it on every rank.

A skipped step changes neither weights nor the optimizer's state nor BatchNorm statistics (which the forward
pass has already spoilt). The ranks agree before the update, since one that skips alone would go another way.
On a GPU all of it is decided on the device where the optimizer is a fused one of torch, which leaves its
weights as they are where it is told to; another optimizer costs one wait for the device a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from train.clip import clip_gradients, total_grad_norm
from train.config import OptimizerSection
from train.distributed import Ranks
from train.loss_spike import LossSpikes

FP16_SEARCH_STEPS = 25  # a gradient scaler may halve its scale as often as that before it counts


class Updater:
    """Applies the gradients of one model.

    Attributes:
        grad_norm: total norm of the last step's gradients before clipping, 0-dimensional on the device.
        num_skipped: steps skipped since the start of the run, 0-dimensional on the device.
        spikes: the steps whose loss was far above the usual.
        gave_up: whether more steps in a row were skipped than allowed, 0-dimensional bool on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        head: list[nn.Module],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: OptimizerSection,
        ranks: Ranks,
    ) -> None:
        self._parameters = list(model.parameters())
        self._head = [parameter for module in head for parameter in module.parameters()]
        self._optimizer = optimizer
        self._scaler = scaler
        self._config = config
        self._ranks = ranks
        self._limit = config.max_skipped_steps + (FP16_SEARCH_STEPS if scaler.is_enabled() else 0)
        self._statistics = _norm_statistics(model)
        self._saved = torch.empty(0)
        self._skipped_in_a_row = torch.zeros((), device=ranks.device)
        self.num_skipped = torch.zeros((), device=ranks.device)
        self.grad_norm = torch.zeros((), device=ranks.device)
        self.spikes = LossSpikes(config.loss_spike, ranks.device)

    @property
    def gave_up(self) -> torch.Tensor:
        return self._skipped_in_a_row > self._limit

    def begin(self) -> None:
        """Before the forward pass: keep BatchNorm statistics, in case that this step is skipped."""
        if self._statistics:
            self._saved = torch.cat([buffer.reshape(-1) for buffer in self._statistics])

    def end(self, loss: torch.Tensor) -> None:
        """Apply the gradients, or skip the step, and drop them.

        Args:
            loss: of this step and rank, 0-dimensional on the device.
        """
        with torch.no_grad():
            self._scaler.unscale_(self._optimizer)
            self.grad_norm = total_grad_norm(self._parameters)
            failed, mean_loss = self._agreed(loss)
            spike = self.spikes.look(mean_loss, failed)
            self.clip(self.grad_norm)
        left_out = torch.maximum(failed, spike) if self.spikes.skips else failed
        self._step(left_out)
        self._optimizer.zero_grad(set_to_none=True)
        self._skipped_in_a_row = (self._skipped_in_a_row + 1) * failed
        self.num_skipped = self.num_skipped + left_out

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to skip, count and give up as if it had not been interrupted."""
        return {
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "spikes": self.spikes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_skipped = state["num_skipped"].to(self.num_skipped)
        self._skipped_in_a_row = state["skipped_in_a_row"].to(self._skipped_in_a_row)
        self.spikes.load_state_dict(state["spikes"])

    def clip(self, total_norm: torch.Tensor | None = None) -> None:
        """Clip the gradients as the recipe has it; `total_norm` is theirs, where it is known."""
        if self._config.clip is not None:
            clip_gradients(self._parameters, self._config.clip, self._head, total_norm)

    def _agreed(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether any rank's loss or gradient is not finite (1.0, else 0.0), and the ranks' mean loss."""
        failed = (~(loss.detach().isfinite() & self.grad_norm.isfinite())).float()
        if self._ranks.world_size == 1:
            return failed, loss.detach()
        # In one reduction; a loss that is not finite would spoil the sum.
        both = torch.stack([failed, torch.where(failed > 0, torch.zeros_like(failed), loss.detach().float())])
        dist.all_reduce(both)
        return both[0].clamp(max=1.0), both[1] / self._ranks.world_size

    def _step(self, left_out: torch.Tensor) -> None:
        if self._scaler.is_enabled():
            # Skips by itself what is not finite: a loss that is not has such gradients. Of spikes it knows
            # nothing, so the host has to ask.
            if not (self.spikes.skips and left_out.item()):
                self._scaler.step(self._optimizer)
            self._scaler.update()
            self._restore_statistics_where(left_out)
        elif left_out.device.type != "cpu" and _skips_on_device(self._optimizer):
            self._optimizer.found_inf = left_out  # type: ignore[attr-defined]
            self._optimizer.step()
            self._restore_statistics_where(left_out)
        elif not left_out.item():
            self._optimizer.step()
        else:
            self._put_statistics(self._saved)

    @torch.no_grad()
    def _restore_statistics_where(self, failed: torch.Tensor) -> None:
        """Without asking the host; in one piece, since each of a hundred buffers would cost a kernel."""
        if self._statistics:
            now = torch.cat([buffer.reshape(-1) for buffer in self._statistics])
            self._put_statistics(torch.where(failed > 0, self._saved, now))

    def _put_statistics(self, values: torch.Tensor) -> None:
        if self._statistics:
            parts = values.split([buffer.numel() for buffer in self._statistics])
            torch._foreach_copy_(self._statistics, parts)


def _norm_statistics(model: nn.Module) -> list[torch.Tensor]:
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    return [buffer for buffer in buffers if buffer is not None]


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step with `found_inf` set leaves everything as it is: torch's fused implementations."""
    supported = getattr(optimizer, "_step_supports_amp_scaling", False)
    return supported and all(group.get("fused") for group in optimizer.param_groups)
