"""Numbers as a person reads them, in the words of a report."""

import math


def percent_text(fraction: float, digits: int = 1) -> str:
    """ "76.3%". "100%" and "0%" stand for all and none and are never the result of rounding."""
    if fraction in (0, 1):
        return f"{fraction:.0%}"
    step = 10.0**-digits
    nearest = min(max(100 * fraction, step), 100 - step)
    return f"{nearest:.{digits}f}%"


def interval_text(interval: tuple[float, float], digits: int = 1) -> str:
    """ "75.9–76.7%"."""
    low, high = (percent_text(end, digits) for end in interval)
    return f"{low[:-1]}–{high}"


def duration_text(seconds: float) -> str:
    """ "26 h 34 min", "35 min 55 s" or "45 s"."""
    whole = math.floor(seconds + 0.5)
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def count_text(count: int, noun: str, plural: str = "") -> str:
    """ "1 image", "50,000 images"; plural where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
