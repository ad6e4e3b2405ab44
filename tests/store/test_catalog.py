"""The catalog: names point to versions, one atomic step at a time, and tenants do not see each other."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from promptd_store import (
    ArtifactError,
    Check,
    CheckFailedError,
    LeaseLostError,
    PreconditionFailedError,
    PromptCatalog,
    PromptKind,
    PromptModelMismatchError,
    PromptNameError,
    PromptNotFoundError,
    Store,
    collect_garbage,
    encode,
    events_log,
    to_peft,
    trim_events,
)

from tests.store.conftest import StoreFactory
from tests.store.files import SPEC, bare_file, soft, soft_file

pytestmark = pytest.mark.anyio

OTHER = replace(SPEC, fingerprint="sha256:" + "b" * 64)


async def test_publish_and_load(catalog: PromptCatalog) -> None:
    """A published prompt is found by its name, with everything that was said about it, and loads bit by bit."""
    made = encode("soft", soft(), base_fingerprint=SPEC.fingerprint, label_words={"z": " good", "a": " bad"})
    record = await catalog.publish("acme", "tone", made.content, provenance={"method": "residual", "score": 0.5})
    assert (record.tenant, record.name, record.number, record.version) == ("acme", "tone", 1, made.version)
    assert (record.kind, record.num_virtual_tokens, record.num_bytes) == (PromptKind.SOFT, 5, len(made.content))
    assert (record.base_fingerprint, record.verified, record.visibility) == (SPEC.fingerprint, True, "private")
    found = await catalog.resolve("acme", "tone")
    assert found == record and found.provenance == {"method": "residual", "score": 0.5}
    assert list(found.manifest["label_words"]) == ["z", "a"]
    loaded = await catalog.load(found)
    assert loaded.version == made.version and loaded.content == made.content
    assert torch.equal(loaded.tensors["prompt_embeddings"], soft())


async def test_unverified_prompts_are_marked(catalog: PromptCatalog) -> None:
    """A file that names no base model is bound to this one and recorded as unverified."""
    record = await catalog.publish("acme", "bare", bare_file(soft()))
    assert (record.verified, record.base_fingerprint) == (False, SPEC.fingerprint)


async def test_peft_upload_comes_back_bit_exact(catalog: PromptCatalog, store: Store) -> None:
    """Weights and config of a PEFT upload survive the store, a new catalog, and the cache."""
    weights = bare_file(soft())
    config = json.dumps({"peft_type": "P_TUNING", "num_virtual_tokens": 5, "odd": "kept"}).encode()
    record = await catalog.publish("acme", "peft", weights, adapter_config=config)
    for reader in (catalog, PromptCatalog(store, SPEC)):
        assert to_peft(await reader.load(await reader.resolve("acme", record.name))) == (config, weights)


async def test_refused_upload_leaves_nothing(catalog: PromptCatalog, store: Store) -> None:
    """A refused file stores no blob, no record and no event."""
    with pytest.raises(ArtifactError):
        await catalog.publish("acme", "tone", bare_file(torch.full((5, 48), float("nan"))))
    assert await store.scan("") == [] and await store.scan_blobs("acme") == [] and await store.read_log("") == []


async def test_versions_and_pins(catalog: PromptCatalog) -> None:
    """Every upload is a new version; numbers and digests pin one for ever, the bare name follows the newest."""
    records = [await catalog.publish("acme", "tone", soft_file(seed)) for seed in range(3)]
    assert [record.number for record in records] == [1, 2, 3]
    assert len({record.etag for record in records}) == 3
    assert (await catalog.resolve("acme", "tone")).number == 3
    for record in records:
        for pin in (str(record.number), record.version):
            found = await catalog.resolve("acme", f"tone@{pin}")
            assert (found.version, found.is_current) == (record.version, record.number == 3)
    assert [(one.number, one.is_current) for one in await catalog.versions("acme", "tone")] == [
        (3, True),
        (2, False),
        (1, False),
    ]
    for pin in ("4", "sha256:" + "0" * 64):
        with pytest.raises(PromptNotFoundError):
            await catalog.resolve("acme", f"tone@{pin}")


async def test_same_publication_changes_nothing(catalog: PromptCatalog, store: Store) -> None:
    """Uploading what the name points to is answered with the present record; after another version it is new again."""
    first = await catalog.publish("acme", "tone", soft_file(1), provenance={"a": [1, 2]})
    assert await catalog.publish("acme", "tone", soft_file(1)) == first
    assert await catalog.publish("acme", "tone", soft_file(1), provenance={"a": (1, 2)}) == first
    assert len(await store.read_log("{acme}:events")) == 1
    await catalog.publish("acme", "tone", soft_file(2))
    third = await catalog.publish("acme", "tone", soft_file(1))
    assert (third.number, third.version) == (3, first.version)
    assert (await catalog.resolve("acme", f"tone@{first.version}")).number == 3


async def test_rollback_moves_the_pointer(catalog: PromptCatalog) -> None:
    """Rolling back makes an old version current under a new etag; no version is made or lost."""
    records = [await catalog.publish("acme", "tone", soft_file(seed)) for seed in range(3)]
    for to, number in ((1, 1), ("2", 2), (records[0].version, 1)):
        moved = await catalog.rollback("acme", "tone", to)
        found = await catalog.resolve("acme", "tone")
        assert moved == found and found.number == number and found.is_current
        assert found.etag not in {record.etag for record in records}
        records.append(found)
    assert (await catalog.publish("acme", "tone", soft_file(9))).number == 4
    with pytest.raises(PromptNotFoundError):
        await catalog.rollback("acme", "tone", 17)
    with pytest.raises(PromptNameError):
        await catalog.rollback("acme", "tone", "yesterday")


async def test_delete_leaves_a_tombstone(catalog: PromptCatalog, store: Store) -> None:
    """A deleted name with all versions is gone at once; its numbers and etags never come back."""
    first = await catalog.publish("acme", "tone", soft_file(1))
    await catalog.publish("acme", "tone", soft_file(2))
    await catalog.delete("acme", "tone")
    for ref in ("tone", "tone@1", f"tone@{first.version}"):
        with pytest.raises(PromptNotFoundError):
            await catalog.resolve("acme", ref)
    with pytest.raises(PromptNotFoundError):
        await catalog.versions("acme", "tone")
    with pytest.raises(PromptNotFoundError):
        await catalog.delete("acme", "tone")
    assert await catalog.list("acme") == []
    again = await catalog.publish("acme", "tone", soft_file(1))
    assert again.number == 3 and again.etag != first.etag
    with pytest.raises(PromptNotFoundError):
        await catalog.resolve("acme", "tone@1")


async def test_one_version_per_base_model(catalog: PromptCatalog, store: Store) -> None:
    """A name has its own current version for each base model; asking under a third is a 409, not a 404."""
    other = PromptCatalog(store, OTHER)
    mine = await catalog.publish("acme", "tone", soft_file(1, base_fingerprint=SPEC.fingerprint))
    with pytest.raises(PromptModelMismatchError) as caught:
        await other.resolve("acme", "tone")
    assert (caught.value.status, caught.value.code) == (409, "prompt_not_available_for_model")
    theirs = await other.publish("acme", "tone", soft_file(2, base_fingerprint=OTHER.fingerprint))
    assert (await catalog.resolve("acme", "tone")).version == mine.version
    assert (await other.resolve("acme", "tone")).version == theirs.version
    third = PromptCatalog(store, replace(SPEC, fingerprint="sha256:" + "c" * 64))
    for ref in ("tone", "tone@1", f"tone@{theirs.version}"):
        with pytest.raises(PromptModelMismatchError):
            await third.resolve("acme", ref)
    with pytest.raises(PromptModelMismatchError):
        await third.load(mine)
    with pytest.raises(PromptModelMismatchError):
        await other.rollback("acme", "tone", 1)
    for each, number in ((catalog, 1), (other, 2)):
        assert [record.number for record in await each.list("acme")] == [number]
    with pytest.raises(ArtifactError) as refused:
        await other.publish("acme", "tone", soft_file(1, base_fingerprint=SPEC.fingerprint))
    assert (refused.value.code, refused.value.status) == ("base_mismatch", 409)


async def test_text_prompts_fit_every_base(catalog: PromptCatalog, store: Store) -> None:
    """A text is found under every base model; whatever was published last under a name is what it means."""
    await catalog.publish("acme", "kind", encode("text", text="Be kind.").content)
    other = PromptCatalog(store, OTHER)
    record = await other.resolve("acme", "kind")
    assert (record.kind, record.base_fingerprint) == (PromptKind.TEXT, None)
    assert (await other.load(record)).manifest.text == "Be kind."
    await catalog.publish("acme", "kind", soft_file(1))
    assert (await catalog.resolve("acme", "kind")).kind is PromptKind.SOFT
    assert (await other.resolve("acme", "kind")).kind is PromptKind.TEXT
    assert await _current(catalog, "kind") == [2] and 1 in await _current(other, "kind")
    await catalog.publish("acme", "kind", encode("text", text="Be brief.").content)
    assert (await catalog.resolve("acme", "kind")).kind is PromptKind.TEXT
    assert await _current(catalog, "kind") == [3]
    await catalog.rollback("acme", "kind", 2)
    assert await _current(catalog, "kind") == [2]


async def _current(catalog: PromptCatalog, name: str) -> list[int]:
    return [record.number for record in await catalog.versions("acme", name) if record.is_current]


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-x", "a/b", "a:b", "a@1", "a b", "a" * 97, "ä", "a\n", "..", "a\0", "{acme}", "%2e"]
)
async def test_bad_names_are_refused(catalog: PromptCatalog, name: str) -> None:
    """Names that could be paths, keys, references or headers cannot be published."""
    with pytest.raises(PromptNameError) as caught:
        await catalog.publish("acme", name, soft_file())
    assert (caught.value.status, caught.value.code) == (400, "invalid_prompt_name")


async def test_good_and_reserved_names(catalog: PromptCatalog) -> None:
    """Every allowed character works; base models' names and the public tenant are taken."""
    for name in ("a", "A.b_c-9", "9" * 96):
        assert (await catalog.publish("acme", name, soft_file())).name == name
    for tenant, name in (("acme", "tiny"), ("public", "tone")):
        with pytest.raises(PromptNameError) as caught:
            await catalog.publish(tenant, name, soft_file())
        assert caught.value.status == 409


@pytest.mark.parametrize(
    "ref", ["", "a@", "a@0", "a@01", "a@-1", "a@latest", "a@sha256:xyz", "a/b/c", "/a", "a/", "a@1@2"]
)
async def test_bad_references_are_refused(catalog: PromptCatalog, ref: str) -> None:
    """A malformed reference is a typed error, not a lookup."""
    with pytest.raises(PromptNameError):
        await catalog.resolve("acme", ref)


@pytest.mark.parametrize(
    "wrong", [{"visibility": "secret"}, {"provenance": {"x": float("nan")}}, {"provenance": {"x": "y" * 70_000}}]
)
async def test_bad_fields_are_refused(catalog: PromptCatalog, wrong: dict[str, object]) -> None:
    """Visibility and provenance are checked before anything is stored."""
    with pytest.raises(ArtifactError):
        await catalog.publish("acme", "tone", soft_file(), **wrong)  # type: ignore[arg-type]


async def test_sidecar_is_kept_beside(catalog: PromptCatalog) -> None:
    """Parameters before folding come back as they were; a prompt without any has none."""
    record = await catalog.publish("acme", "tone", soft_file(1), sidecar=b"raw parameters")
    assert await catalog.load_sidecar(await catalog.resolve("acme", "tone")) == b"raw parameters"
    assert await catalog.publish("acme", "tone", soft_file(1), sidecar=b"raw parameters") == record
    assert (await catalog.publish("acme", "tone", soft_file(1), sidecar=b"others")).number == 2
    assert await catalog.load_sidecar(await catalog.publish("acme", "bare", soft_file(2))) is None


async def test_events_tell_every_move(catalog: PromptCatalog, store: Store) -> None:
    """Publishing, rolling back and deleting each leave one event, in the same transaction."""
    await catalog.publish("acme", "tone", soft_file(1))
    await catalog.publish("acme", "tone", soft_file(2))
    await catalog.rollback("acme", "tone", 1)
    await catalog.delete("acme", "tone")
    events = [json.loads(event.payload) for event in await store.read_log("{acme}:events")]
    assert [event["type"].removeprefix("prompt.") for event in events] == [
        "published",
        "published",
        "rolled_back",
        "deleted",
    ]
    assert {(event["tenant"], event["name"]) for event in events} == {("acme", "tone")}


async def test_lost_lease_cannot_publish(catalog: PromptCatalog, store: Store) -> None:
    """A training job that lost its lease publishes nothing; nor does one whose own record has changed."""
    lease = await store.acquire_lease("{acme}:job:1", "w1", 60)
    assert lease is not None
    await catalog.publish("acme", "tone", soft_file(1), checks=[lease])
    await store.release_lease(lease)
    with pytest.raises(LeaseLostError):
        await catalog.publish("acme", "tone", soft_file(2), checks=[lease])
    with pytest.raises(CheckFailedError):
        await catalog.publish("acme", "tone", soft_file(2), checks=[Check("{acme}:job:1", "7")])
    assert (await catalog.resolve("acme", "tone")).number == 1


async def test_garbage_is_what_no_record_names(catalog: PromptCatalog, store: Store) -> None:
    """Blobs of deleted versions go, shared and fresh ones stay, and living prompts still load."""
    await catalog.publish("acme", "one", soft_file(1), sidecar=b"sidecar")
    await catalog.publish("acme", "two", soft_file(1))
    await catalog.publish("acme", "gone", soft_file(2))
    await catalog.publish("eve", "one", soft_file(2))
    await catalog.delete("acme", "gone")
    assert await collect_garbage(store, "acme") == []
    assert len(await collect_garbage(store, "acme", unused_for_seconds=0)) == 1
    await catalog.delete("acme", "one")
    assert len(await collect_garbage(store, "acme", unused_for_seconds=0)) == 1
    fresh = PromptCatalog(store, SPEC)
    for tenant, name in (("acme", "two"), ("eve", "one")):
        await fresh.load(await fresh.resolve(tenant, name))


async def test_other_catalogs_are_never_stale(open_store: StoreFactory) -> None:
    """A second catalog on the same store sees a publication at once, and its own cache is never stale."""
    one, two = PromptCatalog(await open_store(), SPEC), PromptCatalog(await open_store(), SPEC)
    for seed in range(5):
        made = await one.publish("acme", "tone", soft_file(seed))
        found = await two.resolve("acme", "tone")
        assert found == made and (await two.load(found)).content == soft_file(seed)


async def test_old_events_can_be_trimmed(catalog: PromptCatalog, store: Store) -> None:
    """Events beyond the age go, or all of them but the last; younger ones and other logs stay."""
    await catalog.publish("acme", "tone", soft_file(1))
    await catalog.publish("eve", "tone", soft_file(1))
    log = events_log("acme")
    assert await trim_events(store, log) == 0
    assert await trim_events(store, log, keep_seconds=-1, keep_newest=True) == 0
    assert await trim_events(store, log, keep_seconds=-1) == 1
    assert len(await store.read_log("{eve}:")) == 1


async def test_a_failed_precondition_writes_nothing(catalog: PromptCatalog, store: Store) -> None:
    """412 comes before a blob is written."""
    await catalog.publish("acme", "tone", soft_file(1))
    for conditions in ({"if_match": '"stale"'}, {"if_none_match": "*"}):
        with pytest.raises(PreconditionFailedError):
            await catalog.publish("acme", "tone", soft_file(2), **conditions)
    assert len(await store.scan_blobs("acme")) == 1
