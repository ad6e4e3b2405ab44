"""A process that has imported everything and forks workers on order, so that many can be started and killed quickly.

One JSON order a line on stdin; workers answer on the shared stdout, each line with their pid.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from promptd_store import Append, EmbeddedStore, PromptCatalog, Put, encode

from promptd.tenancy import Tenant, TenantBook
from promptd.tenancy.book import Deed
from tests.store.files import SPEC

NAMES = 3


def say(**message: object) -> None:
    """Write one line in one system call, so that a kill never leaves half of it."""
    os.write(1, json.dumps({"pid": os.getpid(), **message}).encode() + b"\n")


async def write(folder: Path, seed: int, *, lies: bool) -> None:
    """Publish over a few shared names and delete others, for ever; say so after (a liar: before) each is done."""
    catalog = PromptCatalog(EmbeddedStore(folder), SPEC)
    generator = torch.Generator().manual_seed(seed)
    step = 0
    while True:
        artifact = encode("soft", torch.randn(4, SPEC.hidden_size, generator=generator))
        content, name = artifact.content, f"shared-{step % NAMES}"
        if lies:
            say(op="publish", name=name, number=0, version=artifact.version)
        record = await catalog.publish("acme", name, content)
        if not lies:
            say(op="publish", name=name, number=record.number, version=record.version)
        if step % 3 == 2:
            gone = f"gone-{seed}-{step}"
            await catalog.publish("acme", gone, content)
            await catalog.delete("acme", gone)
            say(op="delete", name=gone)
        step += 1


async def govern(folder: Path) -> None:
    """Raise a tenant's limit by one, for ever, each time as an admin's deed; say so after each."""
    book = TenantBook(EmbeddedStore(folder))

    def more(before: Tenant) -> tuple[Tenant, Deed]:
        changes = {"max_prompts": (before.limits.max_prompts or 0) + 1}
        return replace(before, limits=before.limits.changed(changes)), Deed("limits.set", changes)

    while True:
        after = await book.change("acme", "somebody", more)
        say(op="deed", number=after.limits.max_prompts)


async def tell(folder: Path, count: int) -> None:
    """Write a blob, then records and events, and end."""
    store = EmbeddedStore(folder)
    digest = await store.put_blob("acme", b"from the other process")
    for i in range(count):
        await store.transact(puts=[Put(f"{{acme}}:other:{i}", b"x")], appends=[Append("{acme}:events", b"%d" % i)])
    say(op="told", digest=digest)
    await store.close()


def main() -> None:
    """Fork a worker for every order; the order `wait` reports a worker's end."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "wait":
            os.waitpid(order["pid"], 0)
            say(op="ended", ended=order["pid"])
        elif os.fork() == 0:
            say(op="started")
            folder = Path(order["folder"])
            if order["do"] == "tell":
                asyncio.run(tell(folder, order["count"]))
            elif order["do"] == "govern":
                asyncio.run(govern(folder))
            else:
                asyncio.run(write(folder, order["seed"], lies=order["do"] == "lie"))
            os._exit(0)


if __name__ == "__main__":
    main()
