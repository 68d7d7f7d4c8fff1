"""An ONNX model that also tells what it looked at: class activation maps, where the head is linear.

Behind a global average pool and one linear layer, the logit of a class is a bias plus the mean of a map: of
the last features, weighted as that layer weighs them. Grad-CAM of these features is that map, scaled.
Whether a network is of this kind is measured, not looked up.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.explain.capture import captured_outputs, find_module, first_tensor
from evaluation.explain.feature_map import as_map
from evaluation.explain.grad_cam import choose_layer
from serve.export.forms import served_model
from serve.model_folder import Source
from serve.served_model import ServedModel
from train.models.heads import final_layer, head_of, split_outputs

TOLERANCE = 1e-3  # of the largest logit


class MappedModel(nn.Module):
    """uint8 images (n, side, side, 3) → (logits (n, classes), maps (n, classes, rows, columns)), float32."""

    def __init__(self, served: ServedModel, layer: str, weight: Tensor) -> None:
        super().__init__()
        self.served = served
        self._layer = layer
        self.register_buffer("weight", weight.detach().clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        side = (images.shape[1], images.shape[2])
        with captured_outputs({self._layer: find_module(self.served.model, self._layer)}) as outputs:
            logits = self.served(images)
        # The first of two, where the image and its mirror image are averaged.
        features = as_map(first_tensor(outputs[0][1]), side)  # type: ignore[arg-type]
        assert features is not None
        return logits, torch.einsum("nchw,kc->nkhw", features.float(), self.weight)


def mapped_model(source: Source) -> MappedModel | None:
    """The model with maps; None where its head is not one linear layer behind a global average pool."""
    served = served_model(source)
    model, side = served.model, source.info.preprocessing.resolution
    noise = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    images = served.normalize(torch.from_numpy(noise))
    try:
        layer = choose_layer(model, images)
        last = final_layer(head_of(model)[0])
    except ValueError:
        return None
    with torch.no_grad(), captured_outputs({layer: find_module(model, layer)}) as outputs:
        logits = split_outputs(model(images))[0]
    features = as_map(first_tensor(outputs[0][1]), (side, side))  # type: ignore[arg-type]
    weight = last.weight.detach().flatten(1)
    if features is None or weight.shape != (logits.shape[1], features.shape[1]):
        return None
    bias = 0 if last.bias is None else last.bias.detach()
    difference = (features.mean((2, 3)) @ weight.T + bias - logits).abs().max()
    if difference > TOLERANCE * logits.abs().max():
        return None
    return MappedModel(served, layer, weight).eval()
