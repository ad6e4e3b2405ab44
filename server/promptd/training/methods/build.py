"""From settings to trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from promptd_store import PromptKind

from promptd.errors import InvalidRequestError
from promptd.modeling import FrozenModel
from promptd.training.context import FrozenContext
from promptd.training.methods.base import PromptMethod
from promptd.training.methods.config import MethodConfig
from promptd.training.methods.headed import HeadedPrompt
from promptd.training.methods.inits import class_labels, fitted, from_text, random_uniform, sampled_vocabulary
from promptd.training.methods.prefix import PREFIX_DIMS, Banks, PrefixConfig, as_prefix
from promptd.training.methods.registry import METHODS


def build_method(
    config: MethodConfig,
    model: FrozenModel,
    *,
    seed: int,
    label_words: Mapping[str, str] | None = None,
    warm_start: torch.Tensor | None = None,
    behind: FrozenContext | None = None,
    num_classes: int = 0,
) -> PromptMethod:
    """Return trainable parameters on the model's device that depend on nothing but the arguments.

    `warm_start` is a stored prompt to start from instead of `config.init`: a soft prompt `[n, hidden_size]` for any
    method, or a prefix `[num_layers, 2, num_kv_heads, n, head_dim]` for one that learns a prefix. If it has more
    virtual tokens than the config, its first ones are taken; if it has fewer, sampled vocabulary follows them (for a
    prefix: sampled vocabulary's activations at those positions). A prefix that will stand `behind` a context starts as
    the activations that its soft prompt has there. With `num_classes` a head for so many is learned beside it.

    Raises `InvalidRequestError`: init 'class_labels' without label words, a text without tokens, a warm start that
    this model or this method cannot use, tokens for a target where there is no source beside it.
    """
    _check_target(config, model)
    generator = torch.Generator().manual_seed(seed)
    if warm_start is None:
        start = _initial(config, model, generator, label_words)
    else:
        start = _warm(config, model, generator, warm_start)
    if isinstance(config, PrefixConfig):
        start = as_prefix(model, start, behind, _banks(config, model))
    method: PromptMethod = METHODS[config.name].build(config, model, start.cpu(), generator)
    if num_classes:
        method = HeadedPrompt(method, num_classes, model.spec.hidden_size)
    return method.to(model.device)


def _initial(
    config: MethodConfig, model: FrozenModel, generator: torch.Generator, label_words: Mapping[str, str] | None
) -> torch.Tensor:
    count = config.num_learned_tokens
    if config.init == "random_uniform":
        return random_uniform(model, count, generator)
    if config.init == "text":
        return from_text(model, config.init_text or "", count)
    sampled = sampled_vocabulary(model, count, generator, config.init_vocabulary)
    if config.init == "sampled_vocabulary":
        return sampled
    if not label_words:
        raise InvalidRequestError("init must be another than 'class_labels' without label words", param="init")
    return class_labels(model, list(label_words.values()), sampled)


def _warm(config: MethodConfig, model: FrozenModel, generator: torch.Generator, prompt: torch.Tensor) -> torch.Tensor:
    spec, shape = model.spec, tuple(prompt.shape)
    banks = _banks(config, model) if isinstance(config, PrefixConfig) else "all"
    soft_shape = (*shape[:1], spec.hidden_size)
    num_layers = spec.prefix_layers[0 if banks == "decoder" else -1]
    prefix_shape = (num_layers, 2, spec.num_kv_heads, *shape[3:4], spec.head_dim)
    if 0 in shape or shape not in (soft_shape, prefix_shape):
        message = (
            f"warm_start must be a soft prompt or prefix of this model, of the banks that are learned, got the shape "
            f"{shape}"
        )
        raise InvalidRequestError(message, param="warm_start")
    is_prefix = prompt.dim() == PREFIX_DIMS
    if is_prefix and METHODS[config.name].kind != PromptKind.PREFIX:
        message = f"warm_start must be a soft prompt for method {config.name!r}, got a prefix"
        raise InvalidRequestError(message, param="warm_start")
    fresh = sampled_vocabulary(model, config.num_learned_tokens, generator, config.init_vocabulary).cpu()
    prompt = prompt[..., : config.num_virtual_tokens, :]  # what it begins is the source's part
    return fitted(prompt.detach().cpu().float(), as_prefix(model, fresh, banks=banks) if is_prefix else fresh)


def _check_target(config: MethodConfig, model: FrozenModel) -> None:
    if not config.num_target_tokens:
        return
    if isinstance(config, PrefixConfig):
        lacks = "a prefix has its banks"
    elif model.reads_whole or not model.has_sources:
        lacks = "this base model has no source beside its target"
    else:
        return
    raise InvalidRequestError(
        f"num_target_tokens must be 0: {lacks}, got {config.num_target_tokens}", param="num_target_tokens"
    )


def _banks(config: PrefixConfig, model: FrozenModel) -> Banks:
    if config.banks == "decoder" and model.reads_whole:
        raise InvalidRequestError("banks must be 'all': this base model has no decoder, got 'decoder'", param="banks")
    return config.banks
