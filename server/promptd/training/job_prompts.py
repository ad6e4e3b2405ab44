"""The stored prompts that a job names, and the one that it would replace."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from promptd_store import (
    PromptArtifact,
    PromptCatalog,
    PromptChainBrokenError,
    PromptModelMismatchError,
    PromptNotFoundError,
    PromptRecord,
    exact_name,
)

from promptd.errors import InvalidRequestError
from promptd.jobs import JobRecord
from promptd.training.plan import JobPrompts


async def load_prompts(catalog: PromptCatalog, job: JobRecord) -> tuple[JobPrompts, PromptRecord | None]:
    """Load them. Raises `InvalidRequestError`, which names the job's field, where one is not there."""

    async def load(names: Sequence[str], param: str) -> list[PromptArtifact]:
        try:
            chain = await catalog.chain(job.tenant, names)
            return [await catalog.load(record) for record in chain]
        except (PromptNotFoundError, PromptChainBrokenError, PromptModelMismatchError) as error:
            raise InvalidRequestError(f"{param}: {error.message}", param=param, code=error.code) from None

    spec = job.spec
    warm_start = None
    if spec.base_prompt is not None:
        warm_start = (await load([spec.base_prompt], "base_prompt"))[-1].learned
    behind = await load(spec.behind, "behind")
    taught = (spec.distill or {}).get("prompt")
    teacher = [] if taught is None else await load([taught], "distill.prompt")
    replaced = await _own(catalog, job.tenant, job.prompt_name)
    in_service: list[PromptArtifact] = []
    if replaced is not None:
        with suppress(InvalidRequestError):  # what it stands behind is gone: nobody can ask it
            in_service = await load([exact_name(replaced)], "name")
    return JobPrompts(warm_start, in_service, behind, teacher), replaced


async def _own(catalog: PromptCatalog, tenant: str, name: str) -> PromptRecord | None:
    with suppress(PromptNotFoundError):
        record = await catalog.resolve(tenant, f"{tenant}/{name}")
        return record if record.tenant == tenant else None
    return None
