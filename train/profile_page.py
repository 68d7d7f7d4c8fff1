"""The figures of a profiled training, from the trace alone: parts, operators, idle time of the device.

On CPU a part lasts as long as its mark in the trace. On CUDA the host runs ahead of the device, so there a
part is the time of the kernels that were launched inside its mark, by whichever thread: autograd has one of
its own, and marks of the main thread do not reach it.
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PART_PREFIX = "part: "
PARTS = ("data", "augment", "forward", "backward", "update", "log")
WORK = ("forward", "backward", "update")  # all else is overhead
DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCH_CATEGORIES = {"cuda_runtime", "cuda_driver"}
NUM_OPERATORS = 10

Event = dict[str, Any]  # of a Chrome trace: name, cat, ts and dur in microseconds, tid, args
Span = tuple[float, float]  # begin and end, in microseconds


def read_trace(path: Path) -> list[Event]:
    """The complete events of a trace that torch.profiler wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and "dur" in event]


def summarize(
    events: list[Event],
    *,
    num_steps: int,
    wall_seconds: float,
    on_cuda: bool,
    plain_step_seconds: float | None = None,
) -> dict[str, Any]:
    """What `profile.json` holds: seconds are means a step, shares are of the step's wall time.

    Args:
        wall_seconds: of all profiled steps.
        plain_step_seconds: of a step without the profiler, where one was measured.
    """
    marks = _marks(events)
    on_host = {part: sum(end - begin for begin, end in spans) for part, spans in marks.items()}
    device_events = [event for event in events if event.get("cat") in DEVICE_CATEGORIES]
    by_part = _device_by_part(events, device_events, marks) if on_cuda else on_host
    total = wall_seconds * 1e6
    parts = {
        part: {
            "seconds": by_part.get(part, 0.0) / num_steps / 1e6,
            "host_seconds": on_host.get(part, 0.0) / num_steps / 1e6,
            "share": by_part.get(part, 0.0) / total,
        }
        for part in PARTS
    }
    summary: dict[str, Any] = {
        "num_steps": num_steps,
        "device": "cuda" if on_cuda else "cpu",
        "step_seconds": wall_seconds / num_steps,
        "plain_step_seconds": plain_step_seconds,
        "parts": parts,
        "outside_parts": max(0.0, 1 - sum(part["share"] for part in parts.values())),
        "overhead": max(0.0, 1 - sum(parts[name]["share"] for name in WORK)),
        "data_wait_seconds": on_host["data"] / num_steps / 1e6 if "data" in on_host else None,
        "operators": _operators(device_events if on_cuda else _self_times(events), num_steps),
    }
    if on_cuda:
        busy = _covered((event["ts"], event["ts"] + event["dur"]) for event in device_events)
        summary["device_idle"] = max(0.0, 1 - busy / total)
    return summary


def _marks(events: list[Event]) -> dict[str, list[Span]]:
    """Part → its spans on the host."""
    marks: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        # The same marks come again as gpu_user_annotation, on the device's clock.
        if event.get("cat") == "user_annotation" and event["name"].startswith(PART_PREFIX):
            marks[event["name"].removeprefix(PART_PREFIX)].append((event["ts"], event["ts"] + event["dur"]))
    return marks


def _device_by_part(
    events: list[Event], device_events: list[Event], marks: dict[str, list[Span]]
) -> dict[str, float]:
    """Part → microseconds in which the device did something launched from it."""
    spans = sorted((begin, end, part) for part, some in marks.items() for begin, end in some)
    begins = [begin for begin, _, _ in spans]
    launched_at = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in LAUNCH_CATEGORIES and "correlation" in event.get("args", {})
    }
    found: dict[str, list[Span]] = defaultdict(list)
    for event in device_events:
        moment = launched_at.get(event.get("args", {}).get("correlation"))
        position = -1 if moment is None else bisect.bisect_right(begins, moment) - 1
        if position >= 0 and moment is not None and moment <= spans[position][1]:
            found[spans[position][2]].append((event["ts"], event["ts"] + event["dur"]))
    return {part: _covered(some) for part, some in found.items()}


def _covered(spans: Iterable[Span]) -> float:
    """Length of the union: kernels of several streams run at the same time."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _self_times(events: list[Event]) -> list[Event]:
    """Operators with the time of the operators inside them taken off."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event.get("tid")].append({**event, "end": event["ts"] + event["dur"]})
    for thread in threads.values():
        open_ones: list[Event] = []
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while open_ones and open_ones[-1]["end"] <= event["ts"]:
                open_ones.pop()
            if open_ones:
                open_ones[-1]["dur"] -= event["end"] - event["ts"]
            open_ones.append(event)
    return [event for thread in threads.values() for event in thread]


def _operators(events: list[Event], num_steps: int) -> list[dict[str, Any]]:
    """The ones with the most time of their own, most first."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        seconds[event["name"]] += event["dur"] / 1e6
        calls[event["name"]] += 1
    total = sum(seconds.values()) or 1.0
    top = sorted(seconds, key=lambda name: -seconds[name])[:NUM_OPERATORS]
    return [
        {
            "name": name,
            "seconds": seconds[name] / num_steps,
            "calls": calls[name] / num_steps,
            "share": seconds[name] / total,
        }
        for name in top
    ]


def profile_page(summary: dict[str, Any]) -> str:
    """`profile.md`: one page of the summary."""
    on_cuda = summary["device"] == "cuda"
    first, end = summary["steps"]
    lines = [
        f"# Where a step goes: steps {first} to {end} of rank 0",
        "",
        f"A step took **{_ms(summary['step_seconds'])}** on average ({summary['num_steps']} steps, "
        f"{'CUDA' if on_cuda else 'CPU'}).{_slowdown(summary)}",
        "",
        f"| part | {'kernels' if on_cuda else 'time'} a step | share of the step |"
        + (" time of the host |" if on_cuda else ""),
        "|---|--:|--:|" + ("--:|" if on_cuda else ""),
    ]
    for name, part in summary["parts"].items():
        if part["host_seconds"] == 0:
            continue  # this training has no such part
        host = f" {_ms(part['host_seconds'])} |" if on_cuda else ""
        lines.append(f"| {name} | {_ms(part['seconds'])} | {part['share']:.1%} |{host}")
    outside = summary["outside_parts"] * summary["step_seconds"]
    name = "idle, and outside these" if on_cuda else "outside these"
    lines.append(f"| {name} | {_ms(outside)} | {summary['outside_parts']:.1%} |" + (" |" if on_cuda else ""))
    lines += [
        "",
        f"- overhead (all but forward, backward and update): **{summary['overhead']:.1%}**",
    ]
    if summary["data_wait_seconds"] is not None:
        lines.append(f"- the host waits for data: {_ms(summary['data_wait_seconds'])} a step")
    if on_cuda:
        lines.append(f"- the device is idle: **{summary['device_idle']:.1%}** of the time")
    lines += [
        "",
        f"Most time of their own: {'kernels' if on_cuda else 'operators'}, all threads.",
        "",
        "| name | time a step | calls a step | share |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| `{_short(o['name'])}` | {_ms(o['seconds'])} | {o['calls']:.4g} | {o['share']:.1%} |"
        for o in summary["operators"]
    ]
    lines += [
        "",
        "`trace.json.gz` beside this page opens in https://ui.perfetto.dev; there, parts are called "
        f"`{PART_PREFIX}…`. A validation or a checkpoint between two profiled steps counts as outside.",
    ]
    return "\n".join(lines) + "\n"


def _slowdown(summary: dict[str, Any]) -> str:
    plain = summary["plain_step_seconds"]
    if plain is None:
        return ""
    slowed = summary["step_seconds"] > 1.1 * plain
    trust = ": the profiler slows them, so trust the shares" if slowed else ""
    return f" The steps before, without the profiler, took {_ms(plain)}{trust}."


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def _short(name: str) -> str:
    """Names of kernels are C++ templates, some of a thousand characters."""
    plain = name.replace("|", "¦").replace("`", "'")
    return plain if len(plain) <= 80 else plain[:79] + "…"
