"""The prompts that a request names: found, loaded, and what text becomes behind them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from fastapi import Request
from promptd_store import (
    MAX_CHAIN_PROMPTS,
    PromptArtifact,
    PromptNameError,
    PromptNotFoundError,
    PromptRecord,
    extend,
    render_template,
)

from promptd.api.auth import authorize
from promptd.api.schemas import PromptChoice
from promptd.api.services import Services, visit_of
from promptd.api.trail import Trail, trail_of
from promptd.engine.share import Share
from promptd.errors import InvalidRequestError, ModelNotFoundError
from promptd.tenancy import Principal, Scope, Visit, salt_of

_TOKENIZE_INLINE_CHARS = 8192


@dataclass(frozen=True)
class NamedPrompts:
    """What a request's prompt names resolved to."""

    records: tuple[PromptRecord, ...]
    artifacts: tuple[PromptArtifact, ...]
    salt: str
    num_public: int
    """Public prompts at the chain's beginning: their K/V is shared by all tenants."""
    model_name: str
    visit: Visit
    """The request that these were named in."""
    trail: Trail
    """What that request leaves behind."""

    @property
    def share(self) -> Share:
        """Whose work this is: of all tenants the one that was served least comes first."""
        limits = self.visit.limits
        return Share(self.visit.principal.tenant, limits.weight, self.visit.places, limits.max_resident_bytes)

    @property
    def counted_as(self) -> str:
        """The prompt that use is counted under: the last of a chain; empty for the bare model."""
        return self.records[-1].name_for(self.visit.principal.tenant) if self.records else ""

    @property
    def last(self) -> PromptArtifact | None:
        """The artifact whose template, stops and label words apply."""
        return self.artifacts[-1] if self.artifacts else None

    def watching(self, services: Services, token_ids: Sequence[int]) -> AbstractContextManager[None]:
        """Around what runs under these prompts: one that makes non-finite numbers by itself is found."""
        tenant = self.visit.principal.tenant
        pairs = zip(self.records, self.artifacts, strict=True)
        return services.quarantine.watching(tenant, pairs, token_ids)

    @property
    def versions(self) -> list[str]:
        """The exact versions, in the order of the chain."""
        return [record.version for record in self.records]


async def resolve_name(services: Services, principal: Principal, name: str, scope: Scope, param: str) -> PromptRecord:
    """Find what a field of a request names; an error names the field."""
    try:
        record = await services.catalog.resolve(principal.tenant, name)
    except PromptNotFoundError as error:
        raise ModelNotFoundError(f"no model or prompt {name!r}", param=param) from error
    except PromptNameError as error:
        raise InvalidRequestError(f"{param}: {error}", param=param, code=error.code) from error
    authorize(principal, scope, record)
    return record


async def resolve_chain(
    services: Services, principal: Principal, names: Sequence[str], param: str
) -> list[PromptRecord]:
    """Find a chain that a field names, to be asked under it.

    A prompt that was learned behind others brings them along, unless the chain has them in front of it already.
    """
    chain: list[PromptRecord] = []
    for name in names:
        record = await resolve_name(services, principal, name, Scope.INFER, param)
        extend(chain, await services.catalog.in_front(principal.tenant, record), record)
    return chain


async def named_prompts(services: Services, request: Request, body: PromptChoice) -> NamedPrompts:
    """Resolve and load what a body names; raises before anything runs."""
    names = prompt_names(services, body.model, body.prompt_id, body.prompt_ids)
    model_name = body.model or (names[0] if len(names) == 1 else services.model.served_name)
    return await resolve_prompts(services, request, names, model_name, body.naming_field)


async def resolve_prompts(
    services: Services, request: Request, names: Sequence[str], model_name: str, param: str
) -> NamedPrompts:
    """Resolve and load a chain of names, which stood in the field `param`; raises before anything runs."""
    visit, trail = visit_of(request), trail_of(request)
    principal = visit.principal
    with trail.looking_up("resolve"):
        records = await resolve_chain(services, principal, names, param)
    if len(records) > MAX_CHAIN_PROMPTS:
        raise InvalidRequestError(
            f"{param} names a chain of {len(records)} prompts, {MAX_CHAIN_PROMPTS} are allowed", param=param
        )
    await services.quarantine.check(records, param)
    with trail.looking_up("load"):
        artifacts = [await services.catalog.load(record) for record in records]
    trail.model = model_name
    trail.prompts += [record.name for record in records]
    trail.versions += [record.version for record in records]
    visit.mention(record.name_for(principal.tenant) for record in records)
    public = itertools.takewhile(lambda record: record.visibility == "public", records)
    return NamedPrompts(
        tuple(records),
        tuple(artifacts),
        salt_of(principal.tenant),
        sum(1 for _ in public),
        model_name,
        visit,
        trail,
    )


def prompt_names(services: Services, body_model: str | None, prompt_id: str | None, ids: list[str] | None) -> list[str]:
    """Return the chain that a request names: `model="<prompt>"`, `"<base>:<prompt>"`, `prompt_id` or `prompt_ids`."""
    base = services.model.served_name
    named: list[str] = []
    if body_model is not None and body_model != base:
        prefix, separator, rest = body_model.partition(":")
        named = [rest if separator and prefix == base else body_model]
    ways = [bool(named), prompt_id is not None, ids is not None]
    if sum(ways) > 1:
        raise InvalidRequestError(
            f"name the prompt once: got model={body_model!r}, prompt_id={prompt_id!r}, prompt_ids={ids!r}",
            param="prompt_id",
        )
    if body_model == "":
        raise ModelNotFoundError("model is empty: name the base model or a prompt", param="model")
    return named or ([prompt_id] if prompt_id is not None else ids or [])


async def tokenize(services: Services, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Tokenize; long texts off the event loop."""
    if len(text) <= _TOKENIZE_INLINE_CHARS:
        return tuple(services.model.encode(text, add_special_tokens=add_special_tokens))
    ids = await asyncio.to_thread(services.model.encode, text, add_special_tokens=add_special_tokens)
    return tuple(ids)


async def to_tokens(
    services: Services,
    prompts: NamedPrompts,
    text: str | Mapping[str, str] | Sequence[int],
    *,
    apply_template: bool,
    param: str,
) -> tuple[int, ...]:
    """Turn one input into token ids: token ids as given, text and named fields through the prompt's template."""
    manifest = prompts.last.manifest if prompts.last is not None else None
    template = manifest.template if manifest is not None and apply_template else None
    if isinstance(text, Mapping):
        if template is None:
            raise InvalidRequestError(
                f"{param} is an object of fields {sorted(text)!r}, but there is no template to fill", param=param
            )
        text = render_template(template, text)
    elif isinstance(text, str):
        text = render_template(template, {"text": text}) if template is not None else text
    else:
        return tuple(text)
    special = services.model.takes_special_tokens(prompts.artifacts)
    ids = await tokenize(services, text, add_special_tokens=special)
    if not ids:
        bos = services.model.bos_token_id
        if prompts.artifacts and bos is not None:
            return (bos,)
        raise InvalidRequestError(f"{param} is empty", param=param)
    return ids
