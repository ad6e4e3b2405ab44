"""What a Redis must promise before the store trusts it, and how it is addressed: TLS, users, replicas."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from promptd_store import (
    Append,
    Check,
    Put,
    StoreAddressError,
    StoreUnavailableError,
    VolatileStoreError,
    open_store,
    shown_address,
)
from promptd_store.redis_backend import link
from promptd_store.redis_backend.store import CONNECT_SECONDS, RedisStore
from promptd_store.redis_backend.target import parse_target
from typer.testing import CliRunner

from promptd.cli import app
from promptd.commands.doctor import check_store
from tests.ports import free_port
from tests.redis_server import RedisServer, running_redis

pytestmark = pytest.mark.anyio

#: The user that the manual tells to make: what the store needs under one prefix, and nothing else.
ACL = (
    "~promptd:* resetchannels -@all +@read +@write +@connection +eval +evalsha +time +info +config|get +wait "
    "+bgrewriteaof +bgsave -flushall -flushdb -keys"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis whose settings these tests change and put back."""
    with running_redis(tmp_path_factory.mktemp("redis"), repl_diskless_sync_delay="0") as running:
        yield running


def cli(server: RedisServer, *words: str) -> str:
    """Ask with redis-cli, which is not ours."""
    done = subprocess.run(
        ["redis-cli", "-p", str(server.port), *words], check=True, capture_output=True, text=True, timeout=20
    )
    return done.stdout.strip()


def certify(path: Path) -> None:
    """Make a self-signed certificate for loopback with OpenSSL: `path`.crt and .key."""
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{path}.key", "-out", f"{path}.crt"]
    subprocess.run(words, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("setting", "bad", "good", "said"),
    [
        ("appendonly", "no", "yes", "set appendonly yes"),
        ("appendfsync", "everysec", "always", "set appendfsync always"),
        ("appendfsync", "no", "always", "set appendfsync always"),
        ("maxmemory-policy", "allkeys-lru", "noeviction", "set maxmemory-policy noeviction"),
        ("maxmemory-policy", "volatile-ttl", "noeviction", "set maxmemory-policy noeviction"),
        ("no-appendfsync-on-rewrite", "yes", "no", "set no-appendfsync-on-rewrite no"),
    ],
)
async def test_a_redis_that_would_lose_data_is_refused(
    server: RedisServer, setting: str, bad: str, good: str, said: str
) -> None:
    """One clear line that says what to set; allowed, the same line is told. The control is the safe setting."""
    cli(server, "config", "set", setting, bad)
    try:
        with pytest.raises(VolatileStoreError) as caught:
            await open_store(server.url)
        assert str(caught.value).startswith(f"store redis://127.0.0.1:{server.port}/0: ")
        assert len(caught.value.faults) == 1 and said in str(caught.value)
        told: list[str] = []
        await (await open_store(server.url, allow_volatile=True, on_fault=told.append)).close()
        assert told == list(caught.value.faults)
    finally:
        cli(server, "config", "set", setting, good)
    await (await open_store(server.url)).close()


async def test_every_fault_has_its_line(server: RedisServer) -> None:
    """Two faults are two lines."""
    cli(server, "config", "set", "appendonly", "no", "maxmemory-policy", "allkeys-random")
    try:
        with pytest.raises(VolatileStoreError) as caught:
            await open_store(server.url)
        assert len(str(caught.value).splitlines()) == 2
    finally:
        cli(server, "config", "set", "appendonly", "yes", "maxmemory-policy", "noeviction")


def test_a_volatile_redis_from_the_terminal(server: RedisServer) -> None:
    """Commands take what the servers were told to take, and say each fault; else they refuse it."""
    cli(server, "config", "set", "appendonly", "no")
    try:
        for allowed, code, verdict in ((False, 1, "FAIL"), (True, 0, "warn")):
            told = {"PROMPTD_ALLOW_VOLATILE_STORE": str(allowed)}
            done = CliRunner().invoke(app, ["store", "verify", "--store", server.url], env=told)
            assert done.exit_code == code and "set appendonly yes" in " ".join(done.output.split()), done.output
            assert check_store(server.url, None, allowed).verdict == verdict
    finally:
        cli(server, "config", "set", "appendonly", "yes")


async def test_a_newer_release_has_written_it(server: RedisServer) -> None:
    """Data of a layout that this release does not know is not touched."""
    await (await open_store(server.url + "?prefix=newer:")).close()
    cli(server, "set", "newer:schema", "99")
    with pytest.raises(StoreUnavailableError, match="schema version 99"):
        await open_store(server.url + "?prefix=newer:")


async def test_nobody_there() -> None:
    """A port where nothing listens is an error that names the place, in the time given, without the password."""
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError) as caught:
        await RedisStore.open(f"redis://user:s3cret@127.0.0.1:{free_port()}", connect_seconds=0.5)
    assert 0.4 < time.monotonic() - started < CONNECT_SECONDS  # what would be waited otherwise
    assert "127.0.0.1" in str(caught.value) and "s3cret" not in str(caught.value)


async def test_one_that_refuses_is_not_waited_for(server: RedisServer) -> None:
    """Redis is there and answers, but not this user: an error at once that says why."""
    cli(server, "acl", "setuser", "mute", "on", ">s3cret", "~*", "-@all")
    try:
        async with asyncio.timeout(60):
            with pytest.raises(StoreUnavailableError, match="permission"):
                await RedisStore.open(f"redis://mute:s3cret@127.0.0.1:{server.port}", connect_seconds=3600)
    finally:
        cli(server, "acl", "deluser", "mute")


async def test_a_redis_that_starts_late_is_waited_for(tmp_path: Path) -> None:
    """Server and store may be started together: the store waits while Redis loads its data."""
    with running_redis(tmp_path / "redis") as late:
        late.kill()
        opening = asyncio.create_task(RedisStore.open(late.url, connect_seconds=60))
        await asyncio.sleep(0.3)
        assert not opening.done()
        await asyncio.to_thread(late.start)
        await (await opening).close()


async def test_a_user_with_few_rights_is_enough(server: RedisServer) -> None:
    """The store works as a user that sees one prefix; that user can neither wipe, nor set, nor look elsewhere."""
    cli(server, "acl", "setuser", "app", "on", ">s3cret", *ACL.split())
    cli(server, "set", "elsewhere", "1")
    try:
        address = f"redis://app:s3cret@127.0.0.1:{server.port}"
        store = await RedisStore.open(address)
        digest = await store.put_blob("acme", b"x")
        await store.transact([Check("{acme}:k", None)], [Put("{acme}:k", b"1")], appends=[Append("{acme}:e", b"x")])
        subscription = await store.subscribe("{acme}:", after=0)
        assert (await anext(subscription)).payload == b"x"
        lease = await store.acquire_lease("{acme}:l", "w", 10)
        assert lease is not None
        await store.release_lease(await store.renew_lease(lease, 10))
        assert await store.trim_log("{acme}:e", before_seq=1 << 52) == 1
        assert [blob.digest for blob in await store.scan_blobs("acme")] == [digest]
        assert await store.delete_blob("acme", digest)
        for refused in (
            ("FLUSHALL",), ("CONFIG", "SET", "appendonly", "no"), ("KEYS", "*"),
            ("GET", "elsewhere"), ("EVAL", "return redis.call('GET', 'elsewhere')", 0), ("SHUTDOWN",),
        ):  # fmt: skip
            with pytest.raises(StoreUnavailableError, match=r"permission|ACL|NOPERM|access"):
                await store._link.command(*refused)
        await store.close()
        with pytest.raises(StoreUnavailableError) as caught:
            await RedisStore.open(address.replace("s3cret", "wr0ng"), connect_seconds=0.3)
        assert "wr0ng" not in str(caught.value)
    finally:
        cli(server, "acl", "deluser", "app")


async def test_tls(tmp_path: Path) -> None:
    """rediss:// speaks TLS and checks the certificate; one that nobody vouches for is refused."""
    for name in ("ours", "other"):
        certify(tmp_path / name)
    port = free_port()
    options = {
        "tls_port": str(port), "tls_cert_file": str(tmp_path / "ours.crt"), "tls_key_file": str(tmp_path / "ours.key"),
        "tls_ca_cert_file": str(tmp_path / "ours.crt"), "tls_auth_clients": "no",
    }  # fmt: skip
    with running_redis(tmp_path / "redis", **options):
        address = f"rediss://127.0.0.1:{port}?ssl_ca_certs={tmp_path}/ours.crt"
        store = await RedisStore.open(address)
        await store.transact(puts=[Put("{acme}:k", b"1")])
        await store.close()
        for wrong in (address.replace("ours.crt", "other.crt"), f"rediss://127.0.0.1:{port}"):
            with pytest.raises(StoreUnavailableError):
                await RedisStore.open(wrong, connect_seconds=0.3)


async def test_replicas_must_have_it(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With replicas=1 a write is acknowledged when a replica has it; without one the store refuses to start."""
    with pytest.raises(VolatileStoreError, match="0 replicas are connected"):
        await RedisStore.open(server.url + "?replicas=1&prefix=waits:")
    with running_redis(tmp_path / "replica", replicaof=f"127.0.0.1 {server.port}") as replica:
        for _ in range(100):
            if "state=online" in cli(server, "info", "replication"):
                break
            await asyncio.sleep(0.05)
        with pytest.raises(VolatileStoreError, match="read-only replica"):
            await RedisStore.open(replica.url)
        store = await RedisStore.open(server.url + "?replicas=1&prefix=waits:&socket_timeout=5")
        etags = await store.transact(puts=[Put("{acme}:k", b"1")])
        assert cli(replica, "get", "waits:record:{acme}:k").startswith(etags["{acme}:k"])
        replica.pause()
        with monkeypatch.context() as hasty:
            hasty.setattr(link, "WAIT_MILLISECONDS", 100)
            with pytest.raises(StoreUnavailableError, match="0 replicas have the write"):
                await store.transact(puts=[Put("{acme}:k", b"2")])
        replica.resume()
        await store.transact(puts=[Put("{acme}:k", b"3")])
        await store.close()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("redis://localhost", "redis://localhost:6379/0"),
        ("redis://u:s3cret@h:1/7", "redis://h:1/7"),
        ("rediss://:s3cret%40@[::1]:6380/2?ssl_ca_certs=/ca.pem", "rediss://[::1]:6380/2"),
        ("redis+sentinel://u:s3cret@a,b:1/main", "redis+sentinel://a:26379,b:1/main/0"),
        ("rediss+sentinel://a/main/3?sentinel_password=s3cret&replicas=1", "rediss+sentinel://a:26379/main/3"),
    ],
)
def test_addresses(address: str, shown: str) -> None:
    """Every form is read, and shown without its password; neither does a repr show it."""
    assert shown_address(address) == shown
    target = parse_target(address)
    assert ("s3cret" in address) == ("s3cret" in str([target.options, target.sentinel_options]))
    assert "s3cret" not in repr(target)


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("redis://a,b", "redis\\+sentinel"),
        ("redis://a:99999", "a:99999"),
        ("redis://a/x", "'x'"),
        ("redis://a/1/2", "1/2"),
        ("redis+sentinel://a", "primary"),
        ("redis://a?colour=red", "'colour'"),
        ("redis://a?prefix=*", "prefix"),
        ("redis://a?replicas=-1", "replicas"),
        ("redis://a?socket_timeout=soon", "socket_timeout"),
        ("http://a", "http"),
    ],
)
async def test_bad_addresses(address: str, names: str) -> None:
    """A malformed address is a typed error that names the part."""
    with pytest.raises(StoreAddressError, match=names):
        await open_store(address)


async def test_a_folder_needs_no_place_for_blobs(tmp_path: Path) -> None:
    """The embedded store keeps its blobs itself: naming another place is refused, not ignored."""
    with pytest.raises(StoreAddressError, match="blobs"):
        await open_store(str(tmp_path), blobs=str(tmp_path))
