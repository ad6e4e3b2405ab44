"""What a prompt must do before it is published: run once with finite numbers, and pass the operator's probes."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from promptd_store import ArtifactError, PromptArtifact, PromptKind, render_template, template_fields
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from promptd.engine.async_engine import AsyncEngine
from promptd.engine.request import (
    GenerateRequest,
    PoolRequest,
    SamplingParams,
    ScoreRequest,
)
from promptd.engine.share import Share
from promptd.errors import InvalidRequestError, NumericalError
from promptd.tenancy import salt_of

_TRIAL_TEXT = "The quick brown fox jumps over the lazy dog."
_MAX_PROBES = 256
_MAX_REMEMBERED = 10_000
_Words = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...], Field(max_length=64)]


class Probe(BaseModel):
    """One line of the operator's probe suite: a text, and what an answer to it must and must not be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[str, Field(min_length=1, max_length=1 << 16)]
    max_tokens: Annotated[int, Field(ge=1, le=1024)] = 32
    contains: _Words = ()
    """Each must stand in the greedy continuation, whatever the case of its letters."""
    excludes: _Words = ()
    """None may."""
    labels: _Words = ()
    label: str | None = None
    """The one of the labels that must be the most likely next words."""


def read_probes(path: str) -> tuple[Probe, ...]:
    """Read a suite, one JSON object a line; raises `InvalidRequestError` naming the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the probe suite {path!r} cannot be read: {error}", param="probe_suite") from error
    probes: list[Probe] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            probe = Probe.model_validate(json.loads(line))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise _bad_line(path, number, f"{where}: {problem['msg']}") from error
        except ValueError as error:
            raise _bad_line(path, number, str(error)) from error
        if probe.label is not None and probe.label not in probe.labels:
            raise _bad_line(path, number, f"label {probe.label!r} is none of labels")
        if probe.label is None and not (probe.contains or probe.excludes):
            raise _bad_line(path, number, "it expects nothing: give contains, excludes, or labels and label")
        probes.append(probe)
    if not 1 <= len(probes) <= _MAX_PROBES:
        raise InvalidRequestError(
            f"the probe suite {path!r} has {len(probes)} probes, 1 to {_MAX_PROBES} are allowed", param="probe_suite"
        )
    return tuple(probes)


def _bad_line(path: str, number: int, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"the probe suite {path!r}, line {number}: {why}", param="probe_suite")


@dataclass(frozen=True)
class Vetting:
    """Runs prompts on the server's own engine, as requests of the tenant that publishes them."""

    engine: AsyncEngine
    probes: Sequence[Probe] = ()
    timeout_seconds: float = 60.0
    weight_of: Callable[[str], float] = lambda tenant: 1.0
    """A tenant's part of the batch."""
    _passed: dict[tuple[str, str], None] = field(default_factory=dict, init=False, repr=False)
    """Tenants and versions of theirs that have passed here: the same bytes under the same model do so again."""

    async def examine(self, artifact: PromptArtifact, tenant: str) -> None:
        """Raise `ArtifactError` for a prompt that must not be published, with the reason."""
        key = (tenant, artifact.version)  # what another tenant has tried, nobody is to learn from the time it takes
        if key in self._passed:
            return
        if artifact.kind is not PromptKind.TEXT:
            try:
                await self.try_out(artifact, tenant, self._trial_ids(artifact))
            except NumericalError as error:
                raise ArtifactError(
                    "non_finite_output", "with this prompt the model's numbers are not finite", "body"
                ) from error
        passed = await asyncio.gather(*(self._passes(artifact, tenant, probe) for probe in self.probes))
        failed = [number for number, is_good in enumerate(passed, start=1) if not is_good]
        if failed:
            shown = ", ".join(map(str, failed[:16])) + (", …" if len(failed) > 16 else "")
            raise ArtifactError(
                "probe_failed",
                f"{len(failed)} of this server's {len(passed)} probes fail with this prompt: {shown}",
                "body",
            )
        self._passed[key] = None
        if len(self._passed) > _MAX_REMEMBERED:
            del self._passed[next(iter(self._passed))]

    async def try_out(self, artifact: PromptArtifact, tenant: str, token_ids: Sequence[int]) -> None:
        """Run one text under a prompt alone; raises `NumericalError`. What can never run here is let pass."""
        ids, model = tuple(token_ids), self.engine.engine.model
        try:
            if artifact.class_labels is not None:
                await self.engine.pool(PoolRequest(_new_id(), ids, "classes", **self._rest(artifact, tenant)))
            elif model.reads_whole:
                await self.engine.pool(PoolRequest(_new_id(), ids, "embedding", **self._rest(artifact, tenant)))
            else:
                await self._generate(artifact, tenant, ids, 1)
        except InvalidRequestError:
            return

    def _trial_ids(self, artifact: PromptArtifact) -> list[int]:
        """A short text that fits behind the prompt."""
        engine = self.engine.engine
        room = engine.max_model_len - engine.model.num_prompt_tokens((artifact,)) - 1
        return engine.model.encode(_TRIAL_TEXT)[: max(1, room)]

    async def _passes(self, artifact: PromptArtifact, tenant: str, probe: Probe) -> bool:
        model, template = self.engine.engine.model, artifact.manifest.template
        text = probe.prompt
        if template is not None and set(template_fields(template)) == {"text"}:
            text = render_template(template, {"text": text})
        ids = tuple(model.encode(text, add_special_tokens=model.takes_special_tokens((artifact,))))
        try:
            if probe.label is not None:
                words = tuple(tuple(model.encode(one, add_special_tokens=False)) for one in probe.labels)
                request = ScoreRequest(_new_id(), ids, words, **self._rest(artifact, tenant))
                scores = (await self.engine.score(request)).logprobs
                if probe.labels[scores.index(max(scores))] != probe.label:
                    return False
            if not probe.contains and not probe.excludes:
                return True
            answer = (await self._generate(artifact, tenant, ids, probe.max_tokens)).casefold()
        except NumericalError:
            return False
        return all(one.casefold() in answer for one in probe.contains) and not any(
            one.casefold() in answer for one in probe.excludes
        )

    async def _generate(self, artifact: PromptArtifact, tenant: str, ids: tuple[int, ...], max_tokens: int) -> str:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = GenerateRequest(_new_id(), ids, params, **self._rest(artifact, tenant))
        return "".join([output.text async for output in self.engine.submit(request)])

    def _rest(self, artifact: PromptArtifact, tenant: str) -> dict[str, Any]:
        return {
            "prompts": (artifact,),
            "salt": salt_of(tenant),
            "deadline_seconds": self.timeout_seconds,
            "share": Share(tenant, self.weight_of(tenant)),
        }


def _new_id() -> str:
    return f"vet-{secrets.token_hex(16)}"
