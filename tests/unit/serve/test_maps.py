"""ONNX models that tell what they looked at: the same as Grad-CAM, and only where that is so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.explain.grad_cam import grad_cam
from serve.export.forms import write_traced
from serve.model_folder import Source
from serve.page.onnx_model import MAPS, open_onnx
from serve.portable.limits import Limits
from serve.portable.model_info import ModelInfo
from serve.portable.preprocessing import Preprocessing
from serve.space.maps import mapped_model
from train.data.batch import Normalize

CLASSES = tuple("abcde")


class Network(nn.Module):
    """A convolution, a global average pool, and a head."""

    def __init__(self, head: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 5, 4), nn.ReLU())
        self.pool, self.fc = pool, head

    def forward(self, images):
        return self.fc(self.pool(self.body(images)).flatten(1))


def source_of(head, pool=None, flip_average=False):
    torch.manual_seed(1)
    network = Network(head, pool or nn.AdaptiveAvgPool2d(1)).eval()
    preprocessing = Preprocessing(32, 1.0, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    info = ModelInfo(preprocessing, CLASSES, flip_average=flip_average)
    normalize = Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), channels_last=False)
    return Source(network, normalize, info, torch.device("cpu"))


def images(count=3):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def test_onnx_maps_are_grad_cam(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source = source_of(nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 5)), flip_average=True)
    write_traced("onnx", mapped_model(source), 32, tmp_path / "model.onnx", ("logits", MAPS))
    replace(source.info, files={"onnx": "model.onnx"}).save(tmp_path)
    shown = open_onnx(tmp_path, Limits())
    batch = images()
    normalized = source.normalize(torch.from_numpy(batch))
    with torch.no_grad():
        logits = (source.model(normalized) + source.model(normalized.flip(3))) / 2
    np.testing.assert_allclose(shown.classifier.logits(batch), logits, atol=1e-4)
    np.testing.assert_allclose(shown.classifier.logits(batch[:1]), logits[:1], atol=1e-4)
    for label in range(5):
        heat = shown.heat(batch[0], label)
        assert heat.shape == (7, 7) and heat.dtype == np.float32
        maps = grad_cam(source.model, normalized[:1], torch.tensor([label]), "body.1")
        enlarged = nn.functional.interpolate(
            torch.from_numpy(heat)[None, None], (32, 32), mode="bilinear", align_corners=False
        )[0, 0].numpy()
        # The same but for the scale, as each has its own maximum.
        np.testing.assert_allclose(enlarged / max(enlarged.max(), 1e-9), maps[0], atol=1e-3)


def test_only_a_linear_head_behind_an_average_has_maps():
    hidden = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 5))
    assert mapped_model(source_of(hidden)) is None
    assert mapped_model(source_of(nn.Linear(12, 5), nn.AdaptiveMaxPool2d(1))) is None
    assert mapped_model(source_of(nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 5)))) is None
    assert mapped_model(source_of(nn.Linear(12, 5))) is not None
