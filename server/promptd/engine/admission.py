"""What can be known before a request runs: whether it can ever run at all."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

from promptd_store import PromptArtifact, PromptKind

from promptd.engine.detokenizer import Detokenizer
from promptd.engine.prompt_cache import make_segments
from promptd.engine.request import GenerateRequest, Request, ScoreRequest
from promptd.engine.sequence import Sequence
from promptd.errors import ContextLengthError, InvalidArtifactError, InvalidRequestError, QuotaError
from promptd.modeling import Asked, FrozenModel, Reading

if TYPE_CHECKING:
    from promptd.engine.engine import Engine


def admit(request: Request, engine: Engine) -> Sequence:
    """Check a request against the model and the pools; raises a typed error naming the field and the value."""
    model = engine.model
    _check_tokens("prompt", request.prompt_token_ids, model.spec.vocab_size)
    for artifact in request.prompts:
        _check_artifact(artifact, model)
    asked = Asked(request.prompts, request.prompt_token_ids, _reading(request), request.num_public_prompts)
    arranged = model.arrange(asked)
    segments = make_segments(arranged, model)
    num_slots = sum(segment.num_slots for segment in segments)
    if num_slots > engine.prompts.capacity_tokens:
        raise InvalidRequestError(
            f"the prompts take {num_slots} virtual tokens, the prompt cache holds {engine.prompts.capacity_tokens}",
            param="prompt_ids",
        )
    own_bytes = sum(segment.num_slots for segment in segments if not segment.is_public) * engine.pool.bytes_per_slot
    max_bytes = request.share.max_resident_bytes
    if max_bytes is not None and own_bytes > max_bytes:
        raise QuotaError(
            f"the prompts' keys and values take {own_bytes} bytes, {max_bytes} may be resident", param="resident_bytes"
        )
    target, source = arranged.target_ids, arranged.source
    num_in_target = sum(part.embeds.shape[0] for part in arranged.target_virtual)
    detokenizer, seed, num_more, num_extra = None, 0, 0, 0
    if isinstance(request, GenerateRequest):
        if request.params.prompt_logprobs is not None and not arranged.continues_text:
            raise InvalidRequestError(
                "this base model does not predict the text it reads: there is no prompt_logprobs to echo", param="echo"
            )
        num_more = request.params.max_tokens
        target = (*target, *request.begun_token_ids)
        for name, token_ids in (
            ("begun_token_ids", request.begun_token_ids),
            ("logit_bias", request.params.logit_bias),
            ("stop_token_ids", request.params.stop_token_ids),
        ):
            _check_range(name, token_ids, model.spec.vocab_size)
        detokenizer = Detokenizer(model.decode, target[num_in_target:], request.params.stop)
        seed = request.params.seed if request.params.seed is not None else secrets.randbits(63)
    elif isinstance(request, ScoreRequest):
        num_more, num_extra = _check_candidates(request, engine)
        if arranged.readout is not None:
            num_more = num_extra = 0
    num_cached = sum(segment.num_tokens for segment in segments)
    _check_length(engine, num_cached, len(target), num_more)
    num_source = 0 if source is None else len(source.token_ids)
    _check_length(engine, num_cached, num_source, 0)
    if num_source > engine.config.max_num_batched_tokens:
        raise ContextLengthError(
            f"{num_source} tokens are read whole, in one step, which holds {engine.config.max_num_batched_tokens}",
            param="prompt",
        )
    size = engine.config.block_size
    num_kept = num_source if source is not None and source.is_kept else 0
    num_blocks = -(-(len(target) + num_more) // size) + -(-num_extra // size) + -(-num_kept // size)
    if num_blocks > engine.blocks.num_blocks:
        raise ContextLengthError(
            f"{num_kept + len(target) + num_more} tokens need {num_blocks} K/V blocks, "
            f"there are {engine.blocks.num_blocks}",
            param="prompt",
        )
    num_in_source = 0 if source is None else sum(part.embeds.shape[0] for part in source.virtual)
    key = tuple(artifact.version for artifact in request.prompts)
    return Sequence(
        request,
        segments,
        target,
        target_virtual=arranged.target_virtual,
        num_target_virtual=num_in_target,
        source=source,
        readout=arranged.readout,
        num_virtual_tokens=num_cached + num_in_source + num_in_target,
        prefix_key=(request.salt, *key, () if source is None else source.token_ids),
        detokenizer=detokenizer,
        seed=seed,
    )


def _reading(request: Request) -> Reading | None:
    if isinstance(request, GenerateRequest):
        return None
    if isinstance(request, ScoreRequest):
        return Reading("words", request.candidates)
    return Reading(request.kind)


def _check_length(engine: Engine, num_virtual: int, num_text: int, num_more: int) -> None:
    total = num_virtual + num_text + num_more
    if total > engine.max_model_len:
        raise ContextLengthError(
            f"{num_virtual} virtual tokens + {num_text} text tokens + {num_more} to come are {total}, "
            f"more than this model's {engine.max_model_len}",
            param="prompt",
        )


def _check_artifact(artifact: PromptArtifact, model: FrozenModel) -> None:
    """An artifact made for another model must fail here, not inside a batch."""
    spec, count = model.spec, artifact.num_virtual_tokens
    expected: list[tuple[int, ...]]
    if artifact.kind is PromptKind.SOFT:
        name, expected = "prompt_embeddings", [(count, spec.hidden_size)]
    elif artifact.kind is PromptKind.PREFIX:
        name = "prefix"
        expected = [(layers, 2, spec.num_kv_heads, count, spec.head_dim) for layers in spec.prefix_layers]
    else:
        return
    found = tuple(artifact.tensors[name].shape)
    if found not in expected:
        raise InvalidArtifactError(
            f"{name} of {artifact.version} has shape {found}, this model takes " + " or ".join(map(str, expected)),
            param=name,
        )
    beside = artifact.target_embeddings
    if beside is not None and not (spec.num_encoder_layers and beside.shape[1] == spec.hidden_size):
        raise InvalidArtifactError(
            f"target_embeddings of {artifact.version} has shape {tuple(beside.shape)}, this model takes "
            + (f"(m, {spec.hidden_size})" if spec.num_encoder_layers else "none"),
            param="target_embeddings",
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
