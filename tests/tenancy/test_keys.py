"""Keys: what they look like, what is stored of them, two at a time, and how soon they end everywhere."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from promptd_store import EmbeddedStore, StoreUnavailableError

from promptd.errors import AuthenticationError, ConflictError, InvalidRequestError, NotFoundError
from promptd.tenancy import KeyOffice, KeyRing, Scope, TenantBook, TenantDirectory, directory, is_unbroken, read_audit
from promptd.tenancy.api_keys import SECRET_CHARS, _checksum, new_key, parse_key
from promptd.tenancy.store_keys import audit_log, tenant_key
from tests.tenancy.conftest import Clock, opened, with_store

SECRET = b"a secret of the server"


def office_on(store: EmbeddedStore, clock: Clock) -> KeyOffice:
    """An office over its own directory."""
    return KeyOffice(TenantDirectory(TenantBook(store, clock), clock), SECRET)


async def ring_on(store: EmbeddedStore, clock: Clock) -> KeyRing:
    """Another server's view of the same store."""
    ring = KeyRing({}, "the-admin-key", "default", key_secret=SECRET, clock=clock)
    await ring.connect(TenantDirectory(TenantBook(store, clock), clock))
    return ring


def test_a_key_is_recognised_by_its_form() -> None:
    """Prefix and checksum: no two alike, and one wrong character is seen without a look into the store."""
    keys = {new_key().text for _ in range(100)}
    assert len(keys) == 100
    text = keys.pop()
    key = parse_key(text)
    assert key is not None
    assert text.startswith(f"pd_{key.id}_")
    assert text not in repr(key)
    for at in range(len(text)):
        changed = text[:at] + ("a" if text[at] != "a" else "b") + text[at + 1 :]
        assert parse_key(changed) is None
    for other in ("", "pd_", text + "x", text[:-1], f" {text}", text.replace("pd_", "sk_")):
        assert parse_key(other) is None


def test_only_a_digest_is_stored(tmp_path: Path, clock: Clock) -> None:
    """The key's text is nowhere in the store's files, its id is."""
    issued = with_store(tmp_path, lambda store: office_on(store, clock).issue("acme", ["infer"], by="root"))
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert issued.record.id.encode() in content
    secret = issued.key.text.split("_")[2]
    assert secret.encode() not in content
    assert issued.key.digest(SECRET) == issued.record.digest
    assert issued.key.digest(b"another secret") != issued.record.digest


def test_a_key_opens_what_it_was_issued_for(tmp_path: Path, clock: Clock) -> None:
    """Tenant and scopes come from the record; other keys, even of the right id, are all unknown alike."""

    async def run(store: EmbeddedStore) -> None:
        office, ring = office_on(store, clock), await ring_on(store, clock)
        issued = await office.issue("acme", ["infer", "train"], by="root", expires_in_seconds=60)
        principal = await ring.authenticate(f"Bearer {issued.key.text}")
        assert (principal.tenant, principal.scopes) == ("acme", {Scope.INFER, Scope.TRAIN})
        assert principal.key_id == issued.key.id
        forged = new_key().text  # well-formed, never issued
        assert parse_key(forged) is not None
        for given in (forged, issued.key.text[:-1], "the-admin-key2"):
            with pytest.raises(AuthenticationError) as refused:
                await ring.authenticate(f"Bearer {given}")
            assert str(refused.value) == "this API key is not known"
        for given in (None, "", "Basic abc", "Bearer ", issued.key.text):
            with pytest.raises(AuthenticationError) as refused:
                await ring.authenticate(given)
            assert refused.value.code == "missing_api_key"
        clock.now += 60  # expired
        with pytest.raises(AuthenticationError):
            await ring.authenticate(f"Bearer {issued.key.text}")

    with_store(tmp_path, run)


def test_a_key_in_use_is_known_without_a_look(tmp_path: Path, clock: Clock) -> None:
    """Once it was looked up, and until anything of its tenant changes or the news of that are old; nobody else is."""

    async def run(store: EmbeddedStore) -> None:
        office, ring = office_on(store, clock), await ring_on(store, clock)
        issued = await office.issue("acme", ["infer"], by="root", expires_in_seconds=60)
        given = f"Bearer {issued.key.text}"
        assert ring.known(given) is None
        principal = await ring.authenticate(given)
        assert ring.known(given) == principal
        body = f"pd_{issued.key.id}_{new_key().text.split('_')[2][:SECRET_CHARS]}"
        forged = body + _checksum(body)
        assert parse_key(forged) is not None
        for other in (None, "", "Bearer ", issued.key.text, given[:-1], f"Bearer {forged}", "Bearer the-admin-key2"):
            assert ring.known(other) is None
        assert ring.known("Bearer the-admin-key") == await ring.authenticate("Bearer the-admin-key")
        clock.now += directory.MAX_STALE_SECONDS + 0.1
        assert ring.known(given) is None
        assert await ring.authenticate(given) == principal == ring.known(given)
        clock.now += 60  # expired
        assert ring.known(given) is None

    with_store(tmp_path, run)


def test_a_key_of_another_server_secret_is_unknown(tmp_path: Path, clock: Clock) -> None:
    """Who can write the store but does not know the secret cannot make a key."""

    async def run(store: EmbeddedStore) -> None:
        forger = KeyOffice(TenantDirectory(TenantBook(store, clock), clock), b"not the secret")
        issued = await forger.issue("acme", ["admin"], by="nobody")
        ring = await ring_on(store, clock)
        with pytest.raises(AuthenticationError):
            await ring.authenticate(f"Bearer {issued.key.text}")

    with_store(tmp_path, run)


def test_two_keys_at_a_time(tmp_path: Path, clock: Clock) -> None:
    """Of 40 at once over two connections exactly two are made; one more fits when one has ended."""

    async def run(store: EmbeddedStore) -> None:
        async with opened(tmp_path) as second:
            offices = [office_on(store, clock), office_on(second, clock)]
            results = await asyncio.gather(
                *(offices[number % 2].issue("acme", ["infer"], by="root") for number in range(40)),
                return_exceptions=True,
            )
        made = [one for one in results if not isinstance(one, BaseException)]
        assert len(made) == 2
        assert {one.code for one in results if isinstance(one, ConflictError)} == {"too_many_keys"}
        office = offices[0]
        with pytest.raises(ConflictError):
            await office.rotate(made[0].key.id, by="root")
        await office.revoke(made[1].key.id, by="root")
        successor = await office.rotate(made[0].key.id, by="root", grace_seconds=10)
        assert successor.record.scopes == made[0].record.scopes
        ring = await ring_on(store, clock)
        for text in (made[0].key.text, successor.key.text):
            assert (await ring.authenticate(f"Bearer {text}")).tenant == "acme"
        clock.now += 10
        with pytest.raises(AuthenticationError):
            await ring.authenticate(f"Bearer {made[0].key.text}")
        await ring.authenticate(f"Bearer {successor.key.text}")
        with pytest.raises(NotFoundError):
            await office.revoke("aaaaaaaaaaaa", by="root")
        for scopes in ([], ["everything"], ["open"]):
            with pytest.raises(InvalidRequestError) as refused:
                await office.issue("new", scopes, by="root")
            assert refused.value.param == "scopes"

    with_store(tmp_path, run)


def test_ended_keys_do_not_pile_up(tmp_path: Path, clock: Clock) -> None:
    """A tenant's record stays small however often its keys change; the newest ended ones are listed."""

    async def run(store: EmbeddedStore) -> None:
        office = office_on(store, clock)
        for _ in range(20):
            issued = await office.issue("acme", ["infer"], by="root")
            await office.revoke(issued.key.id, by="root")
        listed = await office.list("acme")
        assert len(listed) == 8
        assert listed[-1][1].id == issued.key.id
        assert {office.state(key) for _, key in listed} == {"revoked"}

    with_store(tmp_path, run)


def test_a_revoked_key_ends_everywhere_within_a_second(tmp_path: Path) -> None:
    """Another server that has the key in memory hears of it, and looks that often; without its follower it would not.

    What is measured here is printed: how soon the follower gets its turn is up to the machine.
    """

    async def run(store: EmbeddedStore) -> bool:
        office = KeyOffice(TenantDirectory(TenantBook(store)), SECRET)
        issued = await office.issue("acme", ["infer"], by="root")
        header = f"Bearer {issued.key.text}"
        async with opened(tmp_path) as second:
            tenants = TenantDirectory(TenantBook(second))
            await tenants.poll()
            ring = KeyRing({}, "the-admin-key", "default", key_secret=SECRET)
            await ring.connect(tenants)
            deaf = KeyRing({}, "the-admin-key", "default", key_secret=SECRET)  # the control
            await deaf.connect(TenantDirectory(TenantBook(second), clock=lambda: 0.0))
            following = asyncio.create_task(tenants.follow())
            for known in (ring, deaf):
                await known.authenticate(header)
            await office.revoke(issued.key.id, by="root")
            began = time.monotonic()
            with pytest.raises(AuthenticationError):
                async with asyncio.timeout(60):
                    while True:
                        await ring.authenticate(header)
                        await asyncio.sleep(0.01)
            print(f"revoked on another server after {time.monotonic() - began:.3f} s")
            following.cancel()
            return (await deaf.authenticate(header)).tenant == "acme"

    assert with_store(tmp_path, run)
    assert directory.POLL_SECONDS < directory.MAX_STALE_SECONDS < 1


def test_authentication_needs_no_look_into_the_store(tmp_path: Path, clock: Clock) -> None:
    """A key in use costs the store nothing while the log of changes is read."""

    async def run(store: EmbeddedStore) -> None:
        office, ring = office_on(store, clock), await ring_on(store, clock)
        header = f"Bearer {(await office.issue('acme', ['infer'], by='root')).key.text}"
        await ring.authenticate(header)
        await store.close()
        for _ in range(1000):
            assert (await ring.authenticate(header)).tenant == "acme"
        clock.now += directory.MAX_STALE_SECONDS + 0.1  # the store is gone: what is known stays good for a while
        assert (await ring.authenticate(header)).tenant == "acme"
        clock.now += directory.MAX_OUTAGE_SECONDS
        with pytest.raises(StoreUnavailableError):
            await ring.authenticate(header)

    with_store(tmp_path, run)


def test_a_read_that_a_change_overtook_is_not_kept(tmp_path: Path, clock: Clock) -> None:
    """What was read before a change, but arrives after the change was noticed, must not be remembered."""

    async def run(store: EmbeddedStore) -> None:
        book = TenantBook(store, clock)
        tenants = TenantDirectory(book, clock)
        await tenants.poll()
        office = office_on(store, clock)
        read = book.read

        async def slow(name: str) -> object:
            found = await read(name)
            await office.issue("acme", ["infer"], by="root")
            await tenants.poll()
            return found

        book.read = slow  # type: ignore[method-assign, assignment]
        assert not (await tenants.tenant("acme")).keys
        book.read = read  # type: ignore[method-assign]
        assert len((await tenants.tenant("acme")).keys) == 1

    with_store(tmp_path, run)


def test_the_audit_log_is_a_chain(tmp_path: Path, clock: Clock) -> None:
    """One entry a deed, in the same step; one that was changed, dropped or cut off at the end is found."""

    async def run(store: EmbeddedStore) -> None:
        office = office_on(store, clock)
        issued = await office.issue("acme", ["infer"], by="default/static-admin")
        successor = await office.rotate(issued.key.id, by="default/static-admin")
        await office.revoke(issued.key.id, by="acme/x")
        await office.revoke(issued.key.id, by="acme/x")  # again: nothing happens, nothing is written
        await office.issue("other", ["infer"], by="default/static-admin")
        entries = [entry for _, entry in await read_audit(store, "acme")]
        assert [(one.action, one.by) for one in entries] == [
            ("key.issued", "default/static-admin"),
            ("key.rotated", "default/static-admin"),
            ("key.revoked", "acme/x"),
        ]
        assert len(await read_audit(store, None)) == 4
        payloads = [event.payload for event in await store.read_log(audit_log("acme"))]
        assert issued.key.text.encode() not in b"".join(payloads)
        assert successor.key.text.encode() not in b"".join(payloads)
        head = (await TenantBook(store).read("acme")).audit_head
        assert is_unbroken(payloads, head)
        assert await TenantBook(store).is_intact("acme")
        await store.publish(audit_log("acme"), payloads[0])  # put in later
        assert not await TenantBook(store).is_intact("acme")
        assert await TenantBook(store).is_intact("other")
        changed = payloads[1].replace(b"static-admin", b"somebody-ago")
        for broken in ([payloads[0], changed, payloads[2]], payloads[1:], payloads[:-1], payloads[::2]):
            assert not is_unbroken(broken, head)

    with_store(tmp_path, run)


def test_records_of_tenants_lie_apart(tmp_path: Path, clock: Clock) -> None:
    """The log of one tenant is not read with that of another whose name begins the same."""

    async def run(store: EmbeddedStore) -> None:
        office = office_on(store, clock)
        await office.issue("acme", ["infer"], by="root")
        await office.issue("acme2", ["infer"], by="root")
        assert [entry.tenant for _, entry in await read_audit(store, "acme")] == ["acme"]
        assert await store.get(tenant_key("acme")) is not None
        with pytest.raises(ConflictError):
            await office.issue("public", ["infer"], by="root")

    with_store(tmp_path, run)
