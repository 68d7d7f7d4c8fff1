"""What is answered instead of classes: a status, a word for programs, a sentence for people."""

from __future__ import annotations

import json

from serve.portable.limits import BadImage

# Of BadImage.fault.
STATUS_OF_FAULT = {
    "empty": 400,
    "too_large": 413,
    "too_many_pixels": 413,
    "not_an_image": 415,
    "unsupported": 415,
    "broken": 422,
}
CLIENT_GONE = 499  # never sent; in logs and metrics, as nginx has it


class Refused(Exception):
    """An answer other than 200.

    Attributes:
        status: of HTTP. code: for programs. sentence: for people.
        retry_seconds: when to try again, if that helps.
    """

    def __init__(self, status: int, code: str, sentence: str, retry_seconds: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code, self.sentence, self.retry_seconds = status, code, sentence, retry_seconds

    @classmethod
    def of_image(cls, error: BadImage) -> Refused:
        return cls(STATUS_OF_FAULT[error.fault], error.fault, str(error))

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.retry_seconds is not None:
            headers.append((b"retry-after", str(self.retry_seconds).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers

    def body(self) -> bytes:
        return json.dumps({"error": {"code": self.code, "message": self.sentence}}).encode()


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


def busy(what: str) -> Refused:
    return Refused(503, "busy", f"Too much at once: {what}. Try again in a second.", retry_seconds=1)


def shutting_down() -> Refused:
    return Refused(503, "shutting_down", "This server is being stopped: try again.", retry_seconds=2)
