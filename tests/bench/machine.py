"""The machine's class: what speed depends on, and nothing that names it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch
import transformers

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")


def machine() -> str:
    """Return cores, instruction sets, memory and versions in one line."""
    parts = [f"{platform.machine()}, {os.cpu_count()} cores"]
    if flags := instruction_sets():
        parts.append(" ".join(flags))
    parts.append(f"{psutil.virtual_memory().total / 2**30:.0f} GiB")
    parts.append(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return "; ".join(parts)


def instruction_sets() -> list[str]:
    """Return those that matrix kernels look for; empty where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return []
    lines = info.read_text(encoding="ascii", errors="replace").splitlines()
    words = set(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split())
    return [flag for flag in _FLAGS if flag in words]
