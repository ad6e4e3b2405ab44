"""What can be known before a request runs: whether it can ever run at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

from promptd_store import BaseModelSpec

from promptd.engine.detokenizer import Detokenizer
from promptd.engine.prompt_cache import Segment, make_segments
from promptd.engine.request import GenerateRequest, ScoreRequest
from promptd.engine.sequence import Sequence
from promptd.errors import ContextLengthError, InvalidArtifactError, InvalidRequestError

if TYPE_CHECKING:
    from promptd.engine.engine import Engine


def admit(request: GenerateRequest | ScoreRequest, engine: Engine) -> Sequence:
    """Check a request against the model and the pools; raises a typed error naming the field and the value."""
    model = engine.model
    _check_tokens("prompt", request.prompt_token_ids, model.spec.vocab_size)
    segments = make_segments(
        request.prompts,
        lambda text: model.encode(text, add_special_tokens=False),
        model.bos_token_id,
        request.num_public_prompts,
    )
    for segment in segments:
        _check_segment(segment, model.spec)
    num_virtual = sum(segment.num_tokens for segment in segments)
    if num_virtual > engine.prompts.capacity_tokens:
        raise InvalidRequestError(
            f"the prompts take {num_virtual} virtual tokens, the prompt cache holds {engine.prompts.capacity_tokens}",
            param="prompt_ids",
        )
    num_text = len(request.prompt_token_ids)
    detokenizer, seed = None, 0
    if isinstance(request, GenerateRequest):
        num_more, num_extra = request.params.max_tokens, 0
        for name, token_ids in (
            ("logit_bias", request.params.logit_bias),
            ("stop_token_ids", request.params.stop_token_ids),
        ):
            _check_range(name, token_ids, model.spec.vocab_size)
        detokenizer = Detokenizer(model.decode, request.prompt_token_ids, request.params.stop)
        seed = request.params.seed if request.params.seed is not None else secrets.randbits(63)
    else:
        num_more, num_extra = _check_candidates(request, engine)
    total = num_virtual + num_text + num_more
    if total > engine.max_model_len:
        raise ContextLengthError(
            f"{num_virtual} virtual tokens + {num_text} text tokens + {num_more} to come are {total}, "
            f"more than this model's {engine.max_model_len}",
            param="prompt",
        )
    size = engine.config.block_size
    num_blocks = -(-(num_text + num_more) // size) + -(-num_extra // size)
    if num_blocks > engine.blocks.num_blocks:
        raise ContextLengthError(
            f"{num_text + num_more} tokens need {num_blocks} K/V blocks, there are {engine.blocks.num_blocks}",
            param="prompt",
        )
    return Sequence(
        request,
        segments,
        num_virtual_tokens=num_virtual,
        prefix_key=(request.salt, *(segment.version for segment in segments)),
        detokenizer=detokenizer,
        seed=seed,
    )


def _check_segment(segment: Segment, spec: BaseModelSpec) -> None:
    """An artifact made for another model must fail here, not inside a batch."""
    shapes = {
        "prompt_embeddings": (segment.embeds, (segment.num_tokens, spec.hidden_size)),
        "prefix": (segment.prefix, (spec.num_layers, 2, spec.num_kv_heads, segment.num_tokens, spec.head_dim)),
    }
    for name, (tensor, expected) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise InvalidArtifactError(
                f"{name} of {segment.version} has shape {tuple(tensor.shape)}, this model takes {expected}", param=name
            )


def _check_tokens(name: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    if not token_ids:
        raise InvalidRequestError(f"{name} must not be empty", param=name)
    _check_range(name, token_ids, vocab_size)


def _check_range(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(f"{name}: token id {token_id} is outside 0..{vocab_size - 1}", param=name)


def _check_candidates(request: ScoreRequest, engine: Engine) -> tuple[int, int]:
    """Return the longest candidate's tokens and the sum of those that run beside the text."""
    if not request.candidates:
        raise InvalidRequestError("candidates must not be empty", param="candidates")
    for candidate in request.candidates:
        _check_tokens("candidates", candidate, engine.model.spec.vocab_size)
    extra = sum(len(candidate) - 1 for candidate in request.candidates)
    if extra + 1 > engine.config.max_num_batched_tokens:
        raise InvalidRequestError(
            f"the candidates take {extra} tokens, a step holds {engine.config.max_num_batched_tokens}",
            param="candidates",
        )
    return max(len(candidate) for candidate in request.candidates), extra
