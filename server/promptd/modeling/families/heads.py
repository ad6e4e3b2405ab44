"""Classification heads: the base model's own, or one that was trained and stored with a prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from promptd_store import PromptArtifact
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states of first tokens, `[num_rows, hidden_size]`, to `[num_rows, num_classes]`."""


def base_head(hf: PreTrainedModel) -> Head | None:
    """The checkpoint's classifier; None where it has none."""
    classifier = getattr(hf, "classifier", None)
    if not isinstance(classifier, nn.Module):
        return None
    if hasattr(classifier, "out_proj"):  # RoBERTa's looks at the first token of rows by itself
        return lambda first: classifier(first.unsqueeze(1))
    return lambda first: classifier(pooled(hf, first))


def artifact_head(hf: PreTrainedModel, prompt: PromptArtifact) -> Head | None:
    """The head that came with a prompt, applied where the base model's own would be; None where none came."""
    tensors = {name: tensor.to(hf.device, hf.dtype) for name, tensor in prompt.head.items()}
    if not tensors:
        return None

    def apply(first: torch.Tensor) -> torch.Tensor:
        if "dense.weight" not in tensors:
            return linear(pooled(hf, first), tensors["weight"], tensors.get("bias"))
        inside = torch.tanh(linear(first, tensors["dense.weight"], tensors["dense.bias"]))
        return linear(inside, tensors["out_proj.weight"], tensors["out_proj.bias"])

    return apply


def pooled(hf: PreTrainedModel, first: torch.Tensor) -> torch.Tensor:
    """What a linear head reads: the pooler's output where the model has one, else the states themselves."""
    pooler = getattr(hf.base_model, "pooler", None)
    return first if pooler is None else pooler(first.unsqueeze(1))
