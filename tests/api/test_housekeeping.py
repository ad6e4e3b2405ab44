"""The store's clean-up, as the server runs it."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from prometheus_client import CollectorRegistry
from promptd_store import (
    PROMPTS,
    STORED_BYTES,
    EmbeddedStore,
    Garbage,
    PromptCatalog,
    Record,
    Store,
    StoreUnavailableError,
    encode,
    held_key,
)

from promptd import housekeeping
from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve
from tests.patience import until
from tests.store.files import SPEC, soft_file
from tests.tenancy.conftest import with_store

DAY = 86400.0


@pytest.fixture
def busy(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[LiveServer, Path]]:
    """A server that cleans up twenty times a second, and the folder of its blobs."""
    monkeypatch.setattr(housekeeping, "FIRST_RUN_SECONDS", 0.05)
    settings = Settings(
        model=str(tiny_models["llama"]), store=str(tmp_path), housekeeping_seconds=0.05, drain_seconds=0
    )
    with serve(settings, tiny_models["llama"]) as live:
        yield live, tmp_path / "blobs"


def blobs(folder: Path) -> list[Path]:
    """The files of all tenants."""
    return [path for path in folder.glob("*/*/*") if path.is_file()]


def metric(server: LiveServer, name: str) -> float:
    """One sample without labels."""
    with server.http() as http:
        lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def test_blobs_of_deleted_prompts_disappear(busy: tuple[LiveServer, Path]) -> None:
    """An old blob goes once no prompt names it; one that is named stays, and so does a young one."""
    server, folder = busy
    hidden = server.model.spec.hidden_size
    with server.http() as http:
        for number, name in enumerate(("gone", "kept", "young")):
            content = encode("soft", torch.full((2, hidden), number + 1.0)).content
            assert http.put(f"/v1/prompts/{name}", content=content).status_code == 201
            if name != "young":
                for path in blobs(folder):
                    os.utime(path, (time.time() - 2 * DAY,) * 2)
        assert len(blobs(folder)) == 3
        rounds = metric(server, "promptd_blobs_collected_total")
        assert http.delete("/v1/prompts/gone").status_code == 200
        assert http.delete("/v1/prompts/young").status_code == 200
        until(lambda: len(blobs(folder)) == 2)
        time.sleep(0.2)  # some more rounds
        assert metric(server, "promptd_blobs_collected_total") == rounds + 1
        assert len(blobs(folder)) == 2
        assert http.get("/v1/prompts/kept/content").status_code == 200


def test_a_failing_clean_up_is_counted_and_goes_on(
    busy: tuple[LiveServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that fails during the clean-up costs a count and a log line; requests are served all the while."""
    server, _ = busy
    asked = []

    async def fail(store: Store, tenant: str) -> Garbage:
        asked.append(tenant)
        raise StoreUnavailableError("disk on fire")

    with server.http() as http:
        http.put("/v1/prompts/one", content=encode("soft", torch.ones(2, server.model.spec.hidden_size)).content)
        monkeypatch.setattr(Garbage, "begin", fail)
        until(lambda: metric(server, "promptd_housekeeping_failures_total") >= 2)
        assert {"default", "public"} <= set(asked)
        assert http.get("/v1/prompts/one/content").status_code == 200


def test_a_store_that_goes_away_ends_the_round(tmp_path: Path) -> None:
    """It is not asked again and again: a call to a store that is known to be away fails at once, so that a round which
    went on would leave the event loop, and whoever waits for the store to come back, not a moment."""
    asked: list[str] = []

    class AskedForEver(BaseException):
        """Ends a round that does not end by itself."""

    class Leaving:
        """A store that is away from its second call on."""

        def __init__(self, store: EmbeddedStore) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Callable[..., Any]:
            async def call(*args: Any, **kwargs: Any) -> Any:
                asked.append(name)
                if len(asked) == 1:
                    return await getattr(self._store, name)(*args, **kwargs)
                if len(asked) > 100:
                    raise AskedForEver
                raise StoreUnavailableError("the store is away")

            return call

    async def run() -> None:
        store = EmbeddedStore(tmp_path)
        try:
            await PromptCatalog(store, SPEC).publish("acme", "tone", soft_file(1))
            registry = CollectorRegistry()
            keeper = housekeeping.Housekeeper(
                cast(Store, Leaving(store)),
                housekeeping.HousekeepingMetrics(registry),
                interval_seconds=600,
                min_age_seconds=DAY,
                keep_jobs_seconds=DAY,
            )
            await keeper.clean_up()
            assert asked == ["scan", "get", "scan"]  # the first tenant, what to do with it, the next one
            assert registry.get_sample_value("promptd_housekeeping_failures_total") == 2
        finally:
            await store.close()

    asyncio.run(run())


def test_counts_are_put_right_and_noted_for_the_ledger(busy: tuple[LiveServer, Path]) -> None:
    """Also those of a store that is older than the counting; what lies there is the day's in the ledger."""
    server, folder = busy
    with server.http() as http:
        content = encode("soft", torch.ones(2, server.model.spec.hidden_size)).content
        assert http.put("/v1/prompts/one", content=content).status_code == 201
        held = http.get("/admin/tenants/default").json()["held"]
        assert (held["prompts"], held["stored_bytes"] > len(content)) == (1, True)

        async def lose(store: Store) -> None:
            await store.transact(deletes=[held_key("default", PROMPTS), held_key("default", STORED_BYTES)])

        with_store(folder.parent, lose)
        until(lambda: http.get("/admin/tenants/default").json()["held"] == held)
        until(lambda: http.get("/v1/usage").json()["total"]["stored_byte_days"] == held["stored_bytes"])


def test_every_record_is_read_once(tmp_path: Path) -> None:
    """Whatever is looked for in them. The control is in the count itself: names and versions were read."""
    read: Counter[str] = Counter()

    class Reading:
        """Notes what is read in pages; the walk over tenants looks at one record of each."""

        def __init__(self, store: EmbeddedStore) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        async def scan(self, prefix: str, *, after: str = "", limit: int | None = None) -> list[Record]:
            found = await self._store.scan(prefix, after=after, limit=limit)
            read.update(record.key for record in found if limit != 1)
            return found

    async def run() -> None:
        store = EmbeddedStore(tmp_path)
        catalog = PromptCatalog(store, SPEC)
        for number in range(4):
            await catalog.publish("acme", f"tone-{number % 2}", soft_file(number))
        keeper = housekeeping.Housekeeper(
            cast(Store, Reading(store)),
            housekeeping.HousekeepingMetrics(CollectorRegistry()),
            interval_seconds=600,
            min_age_seconds=DAY,
            keep_jobs_seconds=DAY,
        )
        await keeper.clean_up()
        await store.close()

    asyncio.run(run())
    kinds = Counter(key.split(":")[1] for key in read)
    assert (kinds["prompt"], kinds["version"], kinds["digest"]) == (2, 4, 4)
    assert set(read.values()) == {1}


def test_a_long_round_keeps_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a server goes through its store it asks for the turn again and again, and no more when it is done."""
    monkeypatch.setattr(housekeeping, "FIRST_RUN_SECONDS", 0.0)
    asked: list[str] = []

    class Turns:
        """A store that has nothing but turns."""

        async def acquire_lease(self, what: str, owner: str, seconds: float) -> int:
            asked.append(owner)
            return len(asked)

    class Slow(housekeeping.Housekeeper):
        """Is through when the turn was asked for three times more."""

        async def clean_up(self) -> None:
            while len(asked) < 4:  # noqa: ASYNC110 - of another task
                await asyncio.sleep(0.001)
            through.set()
            await asyncio.Event().wait()

    async def run() -> None:
        keeper = Slow(
            cast(Store, Turns()),
            housekeeping.HousekeepingMetrics(CollectorRegistry()),
            interval_seconds=0.03,
            min_age_seconds=DAY,
            keep_jobs_seconds=DAY,
        )
        running = asyncio.create_task(keeper.run())
        await asyncio.wait_for(through.wait(), 30)
        running.cancel()
        await asyncio.wait([running])
        await asyncio.sleep(0)  # so that what was cancelled with it ends
        assert len(set(asked)) == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}

    through = asyncio.Event()
    asyncio.run(run())


def test_old_versions_go_once_a_day(tmp_path: Path) -> None:
    """As the settings say, in one server's turn; what comes after it waits for the next day."""

    async def run() -> None:
        store = EmbeddedStore(tmp_path)
        catalog, days = PromptCatalog(store, SPEC), {"keep_versions": 2, "unused_days": 30}
        for number in range(4):
            await catalog.publish("acme", "tone", soft_file(number))
        for extra, kept in (({}, 4), (days, 2), (days, 3)):
            metrics = housekeeping.HousekeepingMetrics(CollectorRegistry())
            keeper = housekeeping.Housekeeper(
                store, metrics, interval_seconds=600, min_age_seconds=DAY, keep_jobs_seconds=DAY, **extra
            )
            await keeper.clean_up()
            assert len(await catalog.versions("acme", "tone")) == kept
            if kept == 2:
                await catalog.publish("acme", "tone", soft_file(9))
        await store.close()

    asyncio.run(run())
