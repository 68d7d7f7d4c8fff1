"""The model as MLflow runs it: code, without any pickled object. MLflow copies this file and `portable/`.

Input: a column `image` with the bytes of image files. Output, a row each: `name`, `probability` of the
answer, `names`, `probabilities` of the first five, and `error`, empty where all is well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

TOP = 5


class ImageClassifier(PythonModel):
    """An exported folder's ONNX model."""

    def load_context(self, context: PythonModelContext) -> None:
        from portable.onnx_classifier import OnnxClassifier

        self._classifier = OnnxClassifier(Path(context.artifacts["model"]))

    # Of another type than a table, or of none, MLflow warns whoever loads the model.
    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        return pd.DataFrame([self._row(content) for content in model_input["image"]])

    def _row(self, content: Any) -> dict[str, Any]:
        try:
            if not isinstance(content, bytes | bytearray | memoryview):
                raise ValueError("This is not the bytes of an image file.")
            found = self._classifier.classify([bytes(content)], TOP)[0]
        except ValueError as error:  # of one image; the others are answered all the same
            return {"name": "", "probability": 0.0, "names": [], "probabilities": [], "error": str(error)}
        return {
            "name": found.names[0],
            "probability": found.probabilities[0],
            "names": list(found.names),
            "probabilities": list(found.probabilities),
            "error": "",
        }


set_model(ImageClassifier())
