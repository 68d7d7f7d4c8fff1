"""Static quantisation of an ONNX model to 8 bits, calibrated on training images.

Weights get a scale for each channel, activations one for each tensor, from the extremes that they have on the
calibration images. The first layer's input stays uint8 as before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.export.forms import quiet

NUM_IMAGES = 256
BATCH = 32


def write_int8(onnx_path: Path, path: Path, images: Iterable[NDArray[np.uint8]]) -> None:
    """Quantise `onnx_path` to `path`.

    Args:
        images: prepared training images (side, side, 3), some hundreds.

    Raises:
        ValueError: onnx or onnxruntime is not installed.
    """
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install onnx onnxruntime") from None
    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(onnx_path), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "MatMul", "Gemm", "Add", "GlobalAveragePool", "MaxPool"],
        )


class _Reader:
    """What onnxruntime asks for batches of calibration images."""

    def __init__(self, images: Iterable[NDArray[np.uint8]]) -> None:
        self._batches = _batches(images)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def _batches(images: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    batch: list[NDArray[np.uint8]] = []
    for image in images:
        batch.append(image)
        if len(batch) == BATCH:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)
