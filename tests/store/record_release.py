"""Write down a store as this release writes it, for the tests of releases after it.

    python -m tests.store.record_release tests/store/recorded/<commit>.json

One of everything that servers keep: versions, chains, public names, deletions, tenants with keys and limits, a file,
jobs that wait and that run, use.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from promptd_store import EmbeddedStore, PromptCatalog, Store

from promptd.jobs import JobClaims, JobLimits, JobQueue, JobRequest, JobSpec, TrainingFiles
from promptd.tenancy import Counts, KeyOffice, TenantBook, TenantDirectory, UsageLedger, set_limits
from tests.store.files import SPEC, soft_file

NOW = 1_795_000_000.0
KEY_SECRET = b"0123456789abcdef"
ROWS = b'{"prompt": "1 + 1 =", "completion": "2"}\n'


def clock() -> float:
    """The moment of the recording."""
    return NOW


async def fill(store: Store) -> dict[str, Any]:
    """Do everything once; return what a reader must find."""
    catalog = PromptCatalog(store, SPEC, clock=clock)
    versions = [(await catalog.publish("acme", "tone", soft_file(number))).version for number in range(3)]
    await catalog.rollback("acme", "tone", 2)
    await catalog.publish("acme", "user", soft_file(3), behind=["tone"], provenance={"method": "residual"})
    await catalog.publish("eve", "open", soft_file(4), visibility="public")
    await catalog.publish("acme", "gone", soft_file(5))
    await catalog.delete("acme", "gone")
    directory = TenantDirectory(TenantBook(store, clock))
    await directory.poll()
    await set_limits(directory, "acme", {"weight": 2.0, "requests_per_minute": 60}, by="admin")
    issued = await KeyOffice(directory, KEY_SECRET).issue("acme", ["infer"], by="admin", label="web")
    file = await TrainingFiles(store, clock=clock).create("acme", "rows.jsonl", ROWS)
    queue = JobQueue(store, SPEC.fingerprint, check=lambda spec: None, limits=JobLimits(10, 10), clock=clock)
    jobs = []
    for name in ("first", "second"):
        spec = JobSpec({"type": "residual"}, name, {"num_steps": 10}, training_file=file.id)
        jobs.append((await queue.create("acme", JobRequest(spec, idempotency_key=name))).id)
    claims = JobClaims(store, SPEC.fingerprint, "worker", limits=JobLimits(10, 10), clock=clock)
    (claim,) = await claims.claim(1)
    claim = await claims.save_checkpoint(claim, b"half-way", 5)
    ledger = UsageLedger(store, "server", clock=clock)
    ledger.add("acme", issued.record.id, "tone", Counts(requests=3, prompt_tokens=40, completion_tokens=12))
    await ledger.close()
    return {
        "versions": versions, "key_id": issued.record.id, "file": file.id, "jobs": jobs, "running": claim.job.id,
    }  # fmt: skip


async def recorded() -> dict[str, Any]:
    """Fill a fresh store and return all of it."""
    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddedStore(folder, clock=clock)
        wanted = await fill(store)
        records = {one.key: one.value.decode() for one in await store.scan("{")}
        tenants = sorted({key[1 : key.index("}")] for key in records})
        blobs = {
            tenant: [
                base64.b64encode(await store.get_blob(tenant, blob.digest)).decode()
                for blob in await store.scan_blobs(tenant)
            ]
            for tenant in tenants
        }
        events = [[event.log, event.payload.decode()] for event in await store.read_log("{")]
        await store.close()
    return {"wanted": wanted, "records": records, "blobs": blobs, "events": events}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(asyncio.run(recorded()), indent=1) + "\n")
