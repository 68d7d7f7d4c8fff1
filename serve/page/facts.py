"""What the page says about a model, from what was exported with it."""

from __future__ import annotations

from serve.portable.model_info import ModelInfo

MAX_NAMED = 40


def facts_of(info: ModelInfo, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """(name, value) of the network, its classes and input, and where the weights come from; then `more`."""
    steps, origin = info.preprocessing, info.provenance
    names = ", ".join(info.names[:MAX_NAMED])
    others = len(info.names) - MAX_NAMED
    pairs = [
        ("Network", str(info.model.get("name") or "")),
        ("Run", str(origin.get("run") or "")),
        ("Data set", str(origin.get("data_set") or "")),
        (f"{len(info.names)} classes", names + (f" and {others} more" if others > 0 else "")),
        (
            "It sees",
            f"the centred square of {_share(steps.crop_ratio)} shorter side, "
            f"at {steps.resolution} × {steps.resolution} pixels",
        ),
        *more,
        ("SHA-256 of the checkpoint", str(origin.get("checkpoint_sha256") or "")),
    ]
    return tuple((name, value) for name, value in pairs if value)


def _share(ratio: float) -> str:
    return "the" if ratio == 1 else f"{100 * ratio:.0f}% of the"
