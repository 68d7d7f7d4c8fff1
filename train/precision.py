"""Which arithmetic the hardware has, and the autocast context and gradient scaler for it."""

from __future__ import annotations

from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(mode: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 where the hardware computes it natively, else fp16 on a GPU and fp32 on a CPU.

    A CPU without bf16 instructions emulates them, several times slower than fp32.
    """
    if mode != "auto":
        return mode
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    return "bf16" if _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def set_matmul_precision(precision: str) -> None:
    """Whether products of fp32 numbers may be rounded to 10 bits on the way: for `tf32` only.

    cuDNN rounds convolutions by default, which would make `fp32` a name only.
    """
    rounded = precision == "tf32"
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    torch.backends.cudnn.allow_tf32 = rounded


def build_autocast(precision: str, device: torch.device) -> torch.autocast:
    """Autocast for `precision`; off for fp32 and tf32. Can be entered again and again."""
    lower = DTYPES[precision] != torch.float32
    return torch.autocast(
        device.type, dtype=DTYPES[precision] if lower else None, enabled=lower, cache_enabled=True
    )


def build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Gradient scaler: at work for fp16 only, else it passes everything through."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
