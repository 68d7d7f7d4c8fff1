"""An exported folder's ONNX model, run by onnxruntime.

Example:
    >>> OnnxClassifier(Path("exported/mine"), form="int8", num_threads=2).classify([photo])
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .classifier import Classifier
from .limits import Limits
from .model_info import load_info


class OnnxClassifier(Classifier):
    """A folder made by `python -m serve export RUN --format onnx`.

    Args:
        form: `onnx`, or `int8` where the folder has it.
        num_threads: of one computation; None: as many as the machine has cores.

    Raises:
        ValueError: no such model there, one that onnxruntime cannot read or that does not fit its
            preprocessing.json, or no onnxruntime.
    """

    def __init__(
        self, folder: Path, form: str = "onnx", limits: Limits | None = None, num_threads: int | None = None
    ) -> None:
        super().__init__(load_info(folder), limits)
        self.path = self.info.file(folder, form)
        try:
            import onnxruntime
        except ImportError:
            raise ValueError("onnxruntime is not installed: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Threads that wait for work in a loop take the cores from decoding, and from whoever else is here.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own kinds
            reason = str(error).split("\n")[0][:150]
            raise ValueError(
                f"{self.path} cannot be read by onnxruntime ({reason}): export it again"
            ) from None
        self._check_shapes()

    def _check_shapes(self) -> None:
        side, classes = self.info.preprocessing.resolution, len(self.info.class_names)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        fits = (
            len(inputs) == 1
            and len(outputs) in (1, 2)  # a Space's model has a map of each class, too
            and inputs[0].type == "tensor(uint8)"
            and list(inputs[0].shape[1:]) == [side, side, 3]
            and list(outputs[0].shape[1:]) == [classes]
        )
        if not fits:
            raise ValueError(
                f"{self.path} does not fit the {self.path.parent.name}/preprocessing.json beside it"
            )
        self._input_name, self._logits_name = inputs[0].name, outputs[0].name

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._session.run([self._logits_name], {self._input_name: np.ascontiguousarray(images)})[0]
