"""The CPU's own kernels, in C: compiled once for a machine by its own compiler, and kept.

Where there is no compiler (`cc`, or what `CC` names) torch's products and attention serve, which are slower.
`python -m promptd.modeling.kernels FOLDER` compiles them for machines of every kind, for an image without a compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)
Kernel = TypeVar("Kernel")

FOLDER_VARIABLE = "PROMPTD_KERNELS"
"""Environment: the folder where compiled kernels are kept; `off` for none."""
COMPILE_SECONDS = 120
SOURCES = Path(__file__).parent
# No -ffast-math: sums keep their order, and NaN and infinity stay what they are.
_FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]
_FLAGS_OF = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
NUMBERS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("NUMBERS_BFLOAT16",)}
"""Dtypes of rows, and what sources that include numbers.h are compiled with for them."""
CAPABILITIES = tuple(_FLAGS_OF)
"""Kinds of processors that kernels are compiled for apart, as torch names them."""


def load_kernel(
    source: str, *defines: str, bind: Callable[[ctypes.CDLL], Kernel], passes: Callable[[Kernel], bool]
) -> Kernel | None:
    """Return what `bind` makes of a compiled source of this folder, once it `passes` its trial on this machine.

    None where it cannot be had or is wrong; the log says why.
    """
    if os.environ.get(FOLDER_VARIABLE) == "off":
        return None
    try:
        library = ctypes.CDLL(str(compiled(source, defines, _folder(), torch.backends.cpu.get_cpu_capability())))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:  # the last: nobody's home folder is known
        logger.info("%s: torch's is used, which is slower: %s", source, error)
        return None
    kernel = bind(library)
    if passes(kernel):
        return kernel
    logger.warning("%s: torch's is used: the compiled one is wrong on this machine", source)
    return None


def compiled(source: str, defines: Sequence[str], folder: Path, capability: str) -> Path:
    """Return the library of a source, compiling it where it is not there. Raises `OSError`, `SubprocessError`."""
    flags = [*_FLAGS, *_FLAGS_OF.get(capability, ()), *(f"-D{name}" for name in defines)]
    text = b"".join(path.read_bytes() for path in (SOURCES / source, *sorted(SOURCES.glob("*.h"))))
    name = hashlib.sha256(text + " ".join(flags).encode()).hexdigest()[:16]
    library = folder / f"{Path(source).stem}-{name}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # two processes may do this at once
            made = Path(scratch) / library.name
            _compile([*flags, "-o", str(made), str(SOURCES / source)])
            made.replace(library)
    status = library.stat()
    if status.st_uid not in {0, os.getuid()} or status.st_mode & 0o022:
        raise PermissionError(f"{library} belongs to, or can be changed by, somebody else")
    return library


def _compile(words: list[str]) -> None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"there is no C compiler {compiler[0]!r}")
    done = subprocess.run(  # noqa: S603 - the user's own compiler
        [*compiler, *words], capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
    )
    if done.returncode:
        raise OSError(f"{compiler[0]} failed: {done.stderr.strip()[-300:]}")


def _folder() -> Path:
    if os.environ.get(FOLDER_VARIABLE):
        return Path(os.environ[FOLDER_VARIABLE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promptd" / "kernels"
