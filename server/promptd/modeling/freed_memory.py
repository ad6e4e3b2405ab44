"""Freed memory stays with the process. What the C library gives back to the system comes again page by page, each one
zeroed: of the activations of a text that is read, that was an eighth of its time."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
KEPT_BYTES = 512 << 20
"""At most so much that nobody uses is kept; more goes back to the system."""


def keep_freed_memory() -> bool:
    """Have this process keep what it frees from now on; return whether its C library can (glibc's can).

    What is free by now goes back: loading a model leaves more than serving it will want.
    """
    library = ctypes.CDLL(None)
    mallopt, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or trim is None:
        return False
    trim(0)
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, KEPT_BYTES))
