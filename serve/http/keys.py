"""API keys: from a file or the environment, compared in constant time, kept as digests only."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

VARIABLE = "SERVE_API_KEY"
MIN_CHARACTERS = 16
MAX_BYTES = 64 << 10
HINT = "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"


class ApiKeys:
    """Whether a request may pass; with no keys at all, every one may."""

    def __init__(self, keys: list[str]) -> None:
        for key in keys:
            if len(key) < MIN_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"an API key has {MIN_CHARACTERS} or more printable ASCII characters, no blanks: {HINT}"
                )
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def load(cls, file: Path | None) -> ApiKeys:
        """A key a line of `file` (blank ones and those after # are skipped), else SERVE_API_KEY, else none.

        Raises:
            ValueError: the file has no usable key.
            OSError: it cannot be read.
        """
        if file is not None:
            if file.stat().st_size > MAX_BYTES:
                raise ValueError(f"{file} is no file of API keys: it is too large")
            try:
                lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            except UnicodeDecodeError:
                raise ValueError(f"{file} is no file of API keys: it is no text") from None
            keys = [line for line in lines if line and not line.startswith("#")]
            if not keys:
                raise ValueError(f"{file} holds no API key: write one a line ({HINT})")
            return cls(keys)
        value = os.environ.pop(VARIABLE, None)  # not handed on, and in no dump of the environment
        if value is not None and not value.strip():
            raise ValueError(f"{VARIABLE} is empty: set a key, or unset it to let everybody in")
        return cls([value.strip()] if value else [])

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether `Authorization: Bearer KEY` or `X-API-Key: KEY` names one of the keys."""
        if not self._digests:
            return True
        sent = b""
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                sent = value[7:].strip()
            elif name == b"x-api-key":
                sent = value.strip()
        digest = _digest(sent)
        # All are compared, and digests: the time tells neither which key is near nor how long one is.
        matches = [hmac.compare_digest(digest, own) for own in self._digests]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
