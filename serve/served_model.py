"""The network as it is served: with normalisation, and the flip average where the recipe has one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.data.batch import Normalize
from train.models.heads import split_outputs


class ServedModel(nn.Module):
    """uint8 images (n, side, side, 3) → float32 logits (n, classes)."""

    def __init__(self, model: nn.Module, normalize: Normalize, flip_average: bool) -> None:
        super().__init__()
        self.model, self.normalize, self.flip_average = model, normalize, flip_average

    def forward(self, images: Tensor) -> Tensor:
        normalized = self.normalize(images)
        logits = split_outputs(self.model(normalized))[0].float()
        if self.flip_average:
            mirrored = split_outputs(self.model(torch.flip(normalized, [3])))[0].float()
            logits = (logits + mirrored) / 2
        return logits
