"""Memory of a training on CPUs: what one step frees, the next one takes, without asking the system.

A step allocates the same large tensors as the one before. glibc hands such blocks back to the system as soon
as they are freed, and each new one is zeroed page by page on first use: 5 to 20% of a step on two cores
(benchmarks/RESULTS.md). Peak memory stays what it is; between steps it is kept.
"""

from __future__ import annotations

import ctypes

# Of malloc.h; see mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST = 2**31 - 1
KEPT_BYTES = 1 << 30  # blocks up to this size come from the heap, and stay there
TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; False where the C library is another than glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = {M_MMAP_THRESHOLD: KEPT_BYTES, M_TRIM_THRESHOLD: LARGEST, M_TOP_PAD: TOP_PAD_BYTES}
    done = [mallopt(name, value) == 1 for name, value in settings.items()]  # each, whatever the others say
    return all(done)
