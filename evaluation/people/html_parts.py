"""Figures of a comparison as its page writes them."""

from __future__ import annotations

from collections.abc import Sequence


def p_text(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.0015 else f"p = {p:.1g}"


def signed(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text.replace("-", "−")


def mean_of(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def range_cell(values: Sequence[float]) -> str:
    mean = mean_of(values)
    text = "–" if mean is None else signed(mean)
    span = f"<span>{signed(min(values))} to {signed(max(values))}</span>" if len(values) > 1 else ""
    return f'<td class="number">{text}{span}</td>'
