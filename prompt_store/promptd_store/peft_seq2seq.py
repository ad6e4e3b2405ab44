"""PEFT's layouts for encoder-decoder models, as PEFT itself uses them (read in its 0.17 to 0.21).

Prompt tuning saves `2n` rows for `n` virtual tokens and puts the first n in front of the encoder's input; the others
are never used. Prefix tuning fills the decoder's own attention alone, and because it doubles the stored slots before it
cuts them into fours, decoder layer l reads stored slot 2l modulo their number: of an even number half never act.
"""

from __future__ import annotations

import torch

from promptd_store.artifact import BaseModelSpec
from promptd_store.errors import ArtifactError
from promptd_store.header import TensorEntry
from promptd_store.peft_config import AdapterConfig


def served_rows(entry: TensorEntry, spec: BaseModelSpec, config: AdapterConfig | None) -> int:
    """Return how many of a soft prompt's rows are served: half of them on an encoder-decoder model, unless the
    adapter_config says that it has one part only."""
    rows = entry.shape[0]
    if not spec.num_encoder_layers or (config is not None and config.num_transformer_submodules == 1):
        return rows
    if rows % 2:
        raise ArtifactError(
            "shape_mismatch",
            f"tensor {entry.name} has {rows} rows; on an encoder-decoder model PEFT writes an even number of them",
            entry.name,
        )
    return rows // 2


def served_layers(spec: BaseModelSpec) -> tuple[int, ...]:
    """Return the stored slot that each decoder layer reads.

    Raises `ArtifactError` where PEFT has no slots for some of the decoder's layers.
    """
    stored = spec.peft_layers
    if stored < spec.num_layers:
        raise ArtifactError(
            "peft_layout_not_supported",
            f"PEFT's prefix has {stored} layers, the decoder of {spec.architecture} has {spec.num_layers}",
            "num_layers",
        )
    return tuple(2 * layer % stored for layer in range(spec.num_layers))


def stored_layers(prefix: torch.Tensor, spec: BaseModelSpec) -> torch.Tensor:
    """Return `[num_stored, 2, num_kv_heads, n, head_dim]` of which PEFT makes this prefix of the decoder's layers.

    Raises `ArtifactError` where two layers read one slot and differ, or where the prefix has other banks.
    """
    if prefix.shape[0] != spec.num_layers:
        raise ArtifactError(
            "not_exportable", "PEFT fills the decoder's own attention only; this prefix has banks for others", "format"
        )
    stored = torch.zeros(spec.peft_layers, *prefix.shape[1:], dtype=prefix.dtype)
    taken: dict[int, int] = {}
    for layer, slot in enumerate(served_layers(spec)):
        if slot in taken and not torch.equal(prefix[taken[slot]], prefix[layer]):
            raise ArtifactError(
                "not_exportable",
                f"PEFT reads layers {taken[slot]} and {layer} from one slot, this prefix has different ones for them",
                "format",
            )
        taken[slot] = layer
        stored[slot] = prefix[layer]
    return stored
