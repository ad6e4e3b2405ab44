"""Compile all kernels for every kind of processor: `python -m promptd.modeling.kernels FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

from promptd.modeling.activations import GELU
from promptd.modeling.compiled_linear import LINEAR
from promptd.modeling.compiled_linear import STORED as WEIGHTS
from promptd.modeling.decode_kernel import DECODE_ATTENTION
from promptd.modeling.decode_kernel import STORED as KEYS
from promptd.modeling.integer_product import LINEAR_INT8
from promptd.modeling.kernels import CAPABILITIES, compiled
from promptd.modeling.norms import RMS_NORM
from promptd.modeling.prefill_kernel import PREFILL_ATTENTION
from promptd.modeling.quantized_linear import QUANTIZE

parser = argparse.ArgumentParser(prog="python -m promptd.modeling.kernels", description=__doc__)
parser.add_argument("folder", type=Path)
folder: Path = parser.parse_args().folder
for capability in CAPABILITIES:
    for source in (LINEAR_INT8, GELU, RMS_NORM, QUANTIZE, PREFILL_ATTENTION):
        compiled(source, (), folder, capability)
    for define in WEIGHTS.values():
        compiled(LINEAR, (define,), folder, capability)
    for define in KEYS.values():
        compiled(DECODE_ATTENTION, (define,), folder, capability)
