"""Which part of a model one process holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from promptd.errors import ModelRefusedError
from promptd.modeling.families.base import Sizes

KNOWN_STYLES = frozenset(("colwise", "rowwise", "replicated_with_grad_allreduce"))
"""How transformers may divide a layer: heads and inner features, with one sum behind each pair of projections."""


@dataclass(frozen=True, slots=True)
class Rank:
    """The `index`-th of `size` parts."""

    index: int
    size: int

    def part_of(self, sizes: Sizes) -> Sizes:
        """Return what is left of the heads; raises `ModelRefusedError` where they cannot be divided."""
        for name in ("num_attention_heads", "num_kv_heads"):
            if getattr(sizes, name) % self.size:
                raise ModelRefusedError(f"tensor_parallel {self.size}: {getattr(sizes, name)} {name} are not divisible")
        return replace(
            sizes,
            num_attention_heads=sizes.num_attention_heads // self.size,
            num_kv_heads=sizes.num_kv_heads // self.size,
        )

    def load_options(self, config: Any) -> dict[str, Any]:
        """Return what transformers' `from_pretrained` is asked for: its own plan for this kind of model.

        Embeddings stay whole, because the leader embeds soft prompts alone; so does a head that is tied to them.
        Raises `ModelRefusedError` where there is no plan, or one of parts that we do not know.
        """
        from transformers.distributed.configuration_utils import DistributedConfig

        plan: dict[str, str] = config.base_model_tp_plan or {}
        if not plan:
            raise ModelRefusedError(f"tensor_parallel {self.size}: transformers has no plan for {config.model_type}")
        unknown = sorted(set(plan.values()) - KNOWN_STYLES)
        if unknown:
            raise ModelRefusedError(f"tensor_parallel {self.size}: {config.model_type} is divided by {unknown[0]!r}")
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
        whole = {f"{model_class.base_model_prefix}.embed_tokens": "replicate"}
        if config.tie_word_embeddings:
            whole["lm_head"] = "replicate"
        return {"distributed_config": DistributedConfig(tp_size=self.size, tp_plan=whole)}

    def largest(self, numbers: Sequence[float], device: torch.device) -> tuple[float, ...]:
        """Return the largest of each of some numbers over all parts."""
        found = torch.tensor(numbers, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return tuple(found.tolist())
