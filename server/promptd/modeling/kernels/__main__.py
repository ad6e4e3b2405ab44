"""Compile all kernels for every kind of processor: `python -m promptd.modeling.kernels FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from promptd.modeling.activations import GELU
from promptd.modeling.compiled_linear import LINEAR, LINEAR_GRADIENT, PAIRS_OF_BFLOAT16, STORED
from promptd.modeling.decode_kernel import DECODE_ATTENTION
from promptd.modeling.integer_product import LINEAR_INT8
from promptd.modeling.kernels import CAPABILITIES, NUMBERS, compiled
from promptd.modeling.norms import RMS_NORM
from promptd.modeling.prefill_kernel import PREFILL_ATTENTION
from promptd.modeling.quantized_linear import QUANTIZE

parser = argparse.ArgumentParser(prog="python -m promptd.modeling.kernels", description=__doc__)
parser.add_argument("folder", type=Path)
folder: Path = parser.parse_args().folder
half = (STORED[torch.bfloat16], *NUMBERS[torch.bfloat16])
for capability in CAPABILITIES:
    for source in (LINEAR_INT8, QUANTIZE, PREFILL_ATTENTION):
        compiled(source, (), folder, capability)
    for defines in (*((define,) for define in STORED.values()), half):
        compiled(LINEAR, defines, folder, capability)
    for define in STORED.values():
        compiled(LINEAR_GRADIENT, (define,), folder, capability)
    for source in (DECODE_ATTENTION, GELU, RMS_NORM):
        for defines in NUMBERS.values():
            compiled(source, defines, folder, capability)
compiled(LINEAR, (*half, PAIRS_OF_BFLOAT16), folder, "AVX512")
