"""Counters and histograms in Prometheus' text format; changed on the event loop's thread only.

Label values come from this code, never from a client, so their number is bounded.
"""

from __future__ import annotations

import bisect
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Counter:
    """A number that grows, for each combination of label values."""

    kind = "counter"

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.help_text, self._labels = name, help_text, tuple(labels)
        self._values: defaultdict[tuple[str, ...], float] = defaultdict(float)
        if not self._labels:
            self._values[()] = 0.0

    def add(self, *values: str, amount: float = 1.0) -> None:
        assert len(values) == len(self._labels)
        self._values[values] += amount

    def value(self, *values: str) -> float:
        return self._values.get(values, 0.0)

    def lines(self) -> list[str]:
        rows = sorted(self._values.items())
        return [f"{self.name}{_labels(self._labels, values)} {_number(value)}" for values, value in rows]


class Gauge:
    """A number that is asked for when it is read; `kind` "counter" where it only grows."""

    def __init__(self, name: str, help_text: str, read: Callable[[], float], kind: str = "gauge") -> None:
        self.name, self.help_text, self._read, self.kind = name, help_text, read, kind

    def lines(self) -> list[str]:
        return [f"{self.name} {_number(self._read())}"]


class Info:
    """Facts as labels of a 1."""

    kind = "gauge"

    def __init__(self, name: str, help_text: str, facts: dict[str, str]) -> None:
        self.name, self.help_text = name, help_text
        self._line = f"{name}{_labels(tuple(facts), tuple(facts.values()))} 1"

    def lines(self) -> list[str]:
        return [self._line]


class Histogram:
    """Counts of values by size."""

    kind = "histogram"

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self.name, self.help_text, self._bounds = name, help_text, tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> list[str]:
        lines, total = [], 0
        for bound, count in zip(self._bounds, self._counts, strict=False):
            total += count
            lines.append(f'{self.name}_bucket{{le="{_number(bound)}"}} {total}')
        total += self._counts[-1]
        lines.append(f'{self.name}_bucket{{le="+Inf"}} {total}')
        return [*lines, f"{self.name}_sum {_number(self._sum)}", f"{self.name}_count {total}"]


class Metrics:
    """All of the endpoint's."""

    def __init__(self) -> None:
        self.requests = Counter(
            "serve_requests_total", "Requests by path and status; 499: the client left.", ("path", "status")
        )
        self.request_seconds = Histogram(
            "serve_request_seconds", "POST /predict answered with 200, from its headers on.", SECONDS
        )
        self.images = Counter("serve_images_total", "Images that were classified.")
        self.image_failures = Counter(
            "serve_image_failures_total", "Images that could not be used, by fault.", ("fault",)
        )
        self.batch_size = Histogram("serve_batch_size", "Images in one computation.", BATCHES)
        self.compute_seconds = Histogram("serve_compute_seconds", "One computation of a batch.", SECONDS)
        self.refused_connections = Counter(
            "serve_refused_connections_total",
            "Connections ended before a request was whole, by reason.",
            ("reason",),
        )
        self._others: list[Gauge | Info] = [
            Gauge("process_resident_memory_bytes", "Resident memory.", resident_bytes),
            Gauge("process_cpu_seconds_total", "CPU time of this process.", time.process_time, "counter"),
        ]

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        self._others.append(Gauge(name, help_text, read))

    def info(self, name: str, help_text: str, facts: dict[str, str]) -> None:
        self._others.append(Info(name, help_text, facts))

    def text(self) -> str:
        own = [value for value in vars(self).values() if isinstance(value, Counter | Histogram)]
        lines = []
        for metric in [*own, *self._others]:
            lines += [f"# HELP {metric.name} {metric.help_text}", f"# TYPE {metric.name} {metric.kind}"]
            lines += metric.lines()
        return "\n".join(lines) + "\n"


def resident_bytes() -> float:
    """Of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0.0


def _labels(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(round(float(value), 6))
