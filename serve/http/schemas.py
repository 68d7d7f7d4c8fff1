"""What is answered, as models: they check answers, and describe them in OpenAPI."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field


class ClassProbability(BaseModel):
    label: int = Field(description="The class's ordinal.")
    name: str
    probability: float = Field(ge=0, le=1)


class ErrorFacts(BaseModel):
    code: str = Field(description="A word for programs.")
    message: str = Field(description="A sentence for people.")


class Error(BaseModel):
    error: ErrorFacts


class ImagePrediction(BaseModel):
    name: str | None = Field(description="Of a multipart file, without folders.")
    top: list[ClassProbability] | None = Field(
        description="The most probable class first; null: see `error`."
    )
    error: ErrorFacts | None = None


class ModelFacts(BaseModel):
    title: str
    sha256: str = Field(description="Of the model file that has answered.")
    checkpoint_sha256: str | None = Field(description="Of the checkpoint that it was exported from.")


class Answer(BaseModel):
    model: ModelFacts
    predictions: list[ImagePrediction] = Field(description="One an image, in the order they were sent.")


class Health(BaseModel):
    status: str


ANSWER_EXAMPLE = {
    "model": {
        "title": "resnet50 of run scenes",
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "checkpoint_sha256": "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752",
    },
    "predictions": [
        {
            "name": "beach.jpg",
            "top": [
                {"label": 4, "name": "sea", "probability": 0.912345},
                {"label": 2, "name": "glacier", "probability": 0.061234},
            ],
            "error": None,
        }
    ],
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "description": "An image's bytes as they are, or multipart/form-data with one or several files.",
    "content": {
        "image/jpeg": _BINARY,
        "image/png": _BINARY,
        "image/webp": _BINARY,
        "application/octet-stream": _BINARY,
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    "top": {"type": "integer", "description": "As the query's."},
                },
            },
        },
    },
}
ERRORS = {
    400: ("The body is empty or broken.", "empty", "The file is empty."),
    401: ("No valid API key.", "no_key", "Send a valid API key: Authorization: Bearer KEY."),
    408: ("Sent too slowly.", "too_slow", "The body did not arrive within 30 seconds: send it faster."),
    413: (
        "Too many bytes, pixels or files.",
        "too_many_pixels",
        "The image has 10000 × 10000 pixels, and more than 50,000,000 are not decoded: make it smaller.",
    ),
    415: (
        "No image, or of a kind that is not taken.",
        "not_an_image",
        "This is not an image: send JPEG or PNG.",
    ),
    422: ("A damaged image, or a bad `top`.", "broken", "The JPEG is damaged or cut short (truncated)."),
    503: (
        "Too busy, or being stopped; see Retry-After.",
        "busy",
        "Too much at once: 256 images are waiting.",
    ),
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"example": ANSWER_EXAMPLE}}},
    **{
        status: {
            "model": Error,
            "description": description,
            "content": {"application/json": {"example": {"error": {"code": code, "message": message}}}},
        }
        for status, (description, code, message) in ERRORS.items()
    },
}
