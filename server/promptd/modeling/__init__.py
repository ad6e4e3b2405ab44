"""The base model: loading, freezing, the packed forward pass and its K/V pool."""

import promptd.modeling.heavy_imports  # noqa: F401, first of all  # isort: skip
from promptd.modeling.attention import Site
from promptd.modeling.families.base import Arrangement, Asked, Source
from promptd.modeling.frozen import FrozenModel
from promptd.modeling.kv_pool import KVPool, kv_bytes_per_token
from promptd.modeling.load import load_model
from promptd.modeling.packed_batch import PackedBatch, PackedRow, Virtual
from promptd.modeling.readout import Reading
from promptd.modeling.shared_spans import Span

__all__ = [
    "Arrangement",
    "Asked",
    "FrozenModel",
    "KVPool",
    "PackedBatch",
    "PackedRow",
    "Reading",
    "Site",
    "Source",
    "Span",
    "Virtual",
    "kv_bytes_per_token",
    "load_model",
]
