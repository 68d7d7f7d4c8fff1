"""What the endpoint allows: limits, deadlines, numbers of things."""

from __future__ import annotations

from dataclasses import dataclass, fields

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True)
class Settings:
    """Every limit is reached in the open: the client is told in one sentence, and a metric counts it.

    Attributes:
        max_batch, max_wait_ms: images in one computation; how long one waits for others on their way.
        workers: threads that decode. threads: of onnxruntime; 0: as many as there are cores.
        max_queue: images that were accepted and are not answered yet; beyond it, 503.
        max_bytes, max_pixels, formats: of one image.
        max_files: images in one request. max_request_bytes: of its whole body.
        max_buffered_bytes: of all bodies that are in memory at once; beyond it, 503.
        max_connections: open at once; beyond it, 503.
        header_seconds, body_seconds: for a client to send a request's headers, then its body.
        answer_seconds: from the whole body to the answer. write_seconds: for a client to take the answer.
        keep_alive_seconds: an idle connection stays open.
        grace_seconds: after SIGTERM, for what is in flight.
    """

    max_batch: int = 32
    max_wait_ms: float = 5.0
    workers: int = 2
    threads: int = 0
    max_queue: int = 256
    max_bytes: int = 20 << 20
    max_pixels: int = 50_000_000
    formats: tuple[str, ...] = FORMATS
    max_files: int = 32
    max_request_bytes: int = 80 << 20
    max_buffered_bytes: int = 256 << 20
    max_connections: int = 512
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    answer_seconds: float = 30.0
    write_seconds: float = 10.0
    keep_alive_seconds: int = 15
    grace_seconds: int = 30

    def __post_init__(self) -> None:
        """ValueError: a number that cannot be meant, named as its option."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("max_wait_ms", "threads", "grace_seconds") else 1
            if field.name.endswith("_seconds") and field.name != "grace_seconds":
                least = 0.1  # type: ignore[assignment]
            if isinstance(value, int | float) and not least <= value < 1e12:
                raise ValueError(f"{option(field.name)} is {value}: it must be {least} or more")
        for smaller, larger in (
            ("max_files", "max_queue"),
            ("max_bytes", "max_request_bytes"),
            ("max_request_bytes", "max_buffered_bytes"),
        ):
            if getattr(self, smaller) > getattr(self, larger):
                raise ValueError(
                    f"{option(smaller)} ({getattr(self, smaller):,}) must not be above "
                    f"{option(larger)} ({getattr(self, larger):,})"
                )


def option(name: str) -> str:
    """`max_bytes` → `--max-bytes`."""
    return "--" + name.replace("_", "-")
