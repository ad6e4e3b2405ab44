"""Two releases over one store: what the one before has written, and what the one after will."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from promptd_store import (
    EmbeddedStore,
    PromptCatalog,
    PromptNotFoundError,
    PromptRecord,
    Put,
    RecordTooNewError,
    Store,
    find_faults,
)
from promptd_store.record import PromptName

from promptd.jobs import JobClaims, JobLimits, JobQueue, JobRecord, TrainingFiles
from promptd.jobs.files import FileRecord
from promptd.jobs.ledger import Tally
from promptd.tenancy import Counts, Tenant, TenantBook, TenantDirectory, UsageLedger, set_limits
from tests.store.files import SPEC, soft_file
from tests.store.record_release import NOW, ROWS, clock, fill

pytestmark = pytest.mark.anyio

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
RECORDED_OF = [file.stem for file in RECORDED]
LIMITS = JobLimits(10, 10)


async def play(content: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """Put a recorded store into an empty one; return what a reader must find."""
    for tenant, blobs in content["blobs"].items():
        for blob in blobs:
            await store.put_blob(tenant, base64.b64decode(blob))
    await store.transact(puts=[Put(key, value.encode()) for key, value in content["records"].items()])
    for log, payload in content["events"]:
        await store.publish(log, payload.encode())
    wanted: dict[str, Any] = content["wanted"]
    return wanted


@pytest.mark.parametrize("content", [json.loads(file.read_text()) for file in RECORDED], ids=RECORDED_OF)
async def test_what_the_release_before_wrote_is_read(content: Mapping[str, Any], store: Store) -> None:
    """Prompts, tenants, files, jobs and use are found, go on and change; nothing is lost or damaged."""
    wanted = await play(content, store)
    catalog = PromptCatalog(store, SPEC)
    assert [record.version for record in await catalog.versions("acme", "tone")] == wanted["versions"][::-1]
    tone = await catalog.resolve("acme", "tone")
    assert (tone.number, tone.version) == (2, wanted["versions"][1])
    assert (await catalog.load(tone)).version == tone.version
    user = await catalog.resolve("acme", "user")
    assert [one.version for one in await catalog.in_front("acme", user)] == [tone.version]
    assert user.provenance == {"method": "residual"}
    assert (await catalog.resolve("acme", "open")).tenant == "eve"
    with pytest.raises(PromptNotFoundError):
        await catalog.resolve("acme", "gone")
    tenant = await TenantBook(store).read("acme")
    assert (tenant.limits.weight, tenant.limits.requests_per_minute) == (2.0, 60)
    assert [(key.id, key.label) for key in tenant.active_keys(NOW)] == [(wanted["key_id"], "web")]
    assert (await TrainingFiles(store).content("acme", wanted["file"])) == ROWS
    queue = JobQueue(store, SPEC.fingerprint, check=lambda spec: None, limits=LIMITS)
    assert {(await queue.get("acme", job)).spec.training_file for job in wanted["jobs"]} == {wanted["file"]}
    claims = JobClaims(store, SPEC.fingerprint, "new worker", limits=LIMITS)
    claimed = {claim.job.id: claim for claim in await claims.claim(2)}
    assert sorted(claimed) == sorted(wanted["jobs"])
    assert await claims.load_checkpoint(claimed[wanted["running"]]) == b"half-way"
    ((key, counts),) = await UsageLedger(store, "new server").read("acme", "2000-01-01", "2100-01-01")
    assert (key.prompt, key.key_id, counts.requests, counts.prompt_tokens) == ("tone", wanted["key_id"], 3, 40)
    assert (await catalog.publish("acme", "tone", soft_file(9))).number == 4
    assert (await catalog.publish("acme", "gone", soft_file(9))).number == 2
    assert [fault async for fault in find_faults(store)] == []


def stamps(plain: Any) -> bool:
    """Whether a record's value says which schema it follows."""
    return isinstance(plain, dict) and "schema_version" in plain


async def marked(store: Store) -> list[str]:
    """Write into every record, and into objects in it, what a newer release might; return their keys."""
    keys = []
    for stored in await store.scan("{"):
        try:
            plain = json.loads(stored.value)
        except ValueError:
            continue
        if stamps(plain):
            for name in ("limits", "spec"):
                if name in plain:
                    plain[name]["colour"] = "blue"
            for key in plain.get("keys", ()):
                key["colour"] = "green"
            await store.transact(puts=[Put(stored.key, json.dumps({**plain, "colour": "red"}).encode())])
            keys.append(stored.key)
    return keys


async def test_what_a_newer_release_adds_is_left_as_it_is(tmp_path: Path) -> None:
    """Fields that this release does not know survive each of its changes, at the top and below it."""
    store = EmbeddedStore(tmp_path, clock=clock)
    wanted = await fill(store)
    keys = await marked(store)
    catalog = PromptCatalog(store, SPEC)
    await catalog.rollback("acme", "tone", 1)
    await catalog.publish("acme", "tone", soft_file(9))
    directory = TenantDirectory(TenantBook(store, clock))
    await directory.poll()
    await set_limits(directory, "acme", {"requests_per_minute": 61}, by="admin")
    queue = JobQueue(store, SPEC.fingerprint, check=lambda spec: None, limits=LIMITS, clock=clock)
    claims = JobClaims(store, SPEC.fingerprint, "another", limits=LIMITS, clock=clock)
    (claim,) = await claims.claim(1)
    await claims.save_checkpoint(claim, b"further", 7)
    await queue.pause("acme", next(job for job in wanted["jobs"] if job != claim.job.id))
    ledger = UsageLedger(store, "server", clock=clock)
    ledger.add("acme", wanted["key_id"], "tone", Counts(requests=1))
    await ledger.close()
    for key in keys:
        stored = await store.get(key)
        assert stored is not None, key
        plain = json.loads(stored.value)
        assert plain.get("colour") == "red", key
        assert all(plain[name]["colour"] == "blue" for name in ("limits", "spec") if name in plain), key
        assert all(one["colour"] == "green" for one in plain.get("keys", ())), key
    await store.close()
    kinds = {key.split(":")[1] for key in keys}
    assert {"prompt", "version", "tenant", "file", "job", "usage"} <= kinds, kinds


READERS: Mapping[str, Callable[[bytes], Any]] = {
    "version": PromptRecord.from_bytes,
    "prompt": PromptName.from_bytes,
    "tenant": Tenant.from_bytes,
    "file": FileRecord.from_bytes,
    "job": JobRecord.from_bytes,
}


async def test_what_this_release_would_misread_is_refused(tmp_path: Path) -> None:
    """Records of a newer schema are a typed error each; the control: as they are, they read."""
    store = EmbeddedStore(tmp_path, clock=clock)
    await fill(store)
    found = {}
    for stored in await store.scan("{"):
        kind = stored.key.split(":")[1]
        if kind in READERS:
            READERS[kind](stored.value)
            newer = json.dumps({**json.loads(stored.value), "schema_version": 2}).encode()
            with pytest.raises(RecordTooNewError, match="schema version 2"):
                READERS[kind](newer)
            found[kind] = newer
    assert set(found) == set(READERS)
    with pytest.raises(RecordTooNewError):
        Tally.from_bytes(b'{"schema_version": 2, "tenant": "acme", "served_at": 0}')
    await store.close()
