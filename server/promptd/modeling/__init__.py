"""The base model: loading, freezing, the packed forward pass and its K/V pool."""

from promptd.modeling.frozen import FrozenModel
from promptd.modeling.kv_pool import KVPool, Span, kv_bytes_per_token
from promptd.modeling.load import load_model
from promptd.modeling.packed_batch import PackedBatch, PackedRow

__all__ = [
    "FrozenModel",
    "KVPool",
    "PackedBatch",
    "PackedRow",
    "Span",
    "kv_bytes_per_token",
    "load_model",
]
