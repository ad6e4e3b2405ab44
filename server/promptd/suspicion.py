"""Finds prompts that make the model's numbers non-finite, and keeps them from being served.

Only a tenant's own requests put its own prompts there, and only a version that fails by itself: nobody can have
another's prompt, nor a good one in a chain with a bad one, taken out of service.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog
from promptd_store import PromptArtifact, PromptKind, PromptRecord, StoreError, StoreUnavailableError

from promptd.errors import NumericalError, PromptdError, QuarantinedError
from promptd.tenancy import TenantDirectory, quarantine
from promptd.vetting import Vetting

_MAX_SUSPECTS = 16
_log = structlog.get_logger("promptd.quarantine")


@dataclass
class Quarantine:
    """Looks into failures beside the requests that met them."""

    tenants: TenantDirectory
    vetting: Vetting
    _suspects: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def check(self, records: Sequence[PromptRecord], param: str) -> None:
        """Raise `QuarantinedError` for the first version that is not served."""
        for record in records:
            try:
                owner = await self.tenants.tenant(record.tenant, max_outage_seconds=math.inf)
            except StoreUnavailableError:  # served all the same: a row with non-finite numbers still fails by itself
                continue
            if owner.is_quarantined(record.version):
                raise QuarantinedError(
                    f"prompt {record.name!r}, version {record.version}, is quarantined: with it the model's numbers "
                    "were not finite; publish another version, or have an admin release this one",
                    param=param,
                )

    @contextmanager
    def watching(
        self, tenant: str, prompts: Iterable[tuple[PromptRecord, PromptArtifact]], token_ids: Sequence[int]
    ) -> Iterator[None]:
        """Where the block fails with non-finite numbers, try each of the caller's own prompts alone on that text."""
        try:
            yield
        except NumericalError:
            self._suspect(tenant, prompts, token_ids)
            raise

    def _suspect(
        self, tenant: str, prompts: Iterable[tuple[PromptRecord, PromptArtifact]], token_ids: Sequence[int]
    ) -> None:
        """A few at a time, each once."""
        for record, artifact in prompts:
            is_new = record.version not in self._suspects and len(self._suspects) < _MAX_SUSPECTS
            if record.tenant == tenant and artifact.kind is not PromptKind.TEXT and is_new:
                task = asyncio.create_task(self._try(record, artifact, tuple(token_ids)))
                self._suspects[record.version] = task

    async def _try(self, record: PromptRecord, artifact: PromptArtifact, token_ids: tuple[int, ...]) -> None:
        try:
            await self.vetting.try_out(artifact, record.tenant, token_ids)
        except NumericalError:
            _log.warning("prompt_quarantined", tenant=record.tenant, prompt=record.name, version=record.version)
            try:
                await quarantine(self.tenants, record.tenant, record.name, record.version, by="server")
            except (StoreError, PromptdError) as error:  # the next request that fails tries again
                _log.error("quarantine_failed", version=record.version, code=error.code)
        except PromptdError:
            pass  # it could not be tried now
        finally:
            del self._suspects[record.version]
