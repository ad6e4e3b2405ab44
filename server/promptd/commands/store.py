"""`promptd store backup | restore | copy | verify | gc`: a store as a whole, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from promptd.commands.console import err, fail, out

if TYPE_CHECKING:
    from promptd_store import Store
    from promptd_store.transfer import Transferred

T = TypeVar("T")

StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        "-s",
        envvar="PROMPTD_STORE",
        help="The store: a folder, or the URL of a Redis.",
        metavar="DIR_OR_URL",
    ),
]
BlobsOption = Annotated[
    str | None,
    typer.Option(
        "--blobs",
        envvar="PROMPTD_BLOBS",
        help="Where a Redis keeps its large files: as its servers were told.",
        metavar="DIR_OR_URL",
    ),
]
VolatileOption = Annotated[
    bool,
    typer.Option(
        "--allow-volatile-store",
        envvar="PROMPTD_ALLOW_VOLATILE_STORE",
        help="Take a Redis that may lose what was acknowledged: as its servers were told.",
    ),
]
Folder = Annotated[Path, typer.Argument(help="Folder of the backup.", metavar="DIR")]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Back up, restore, move, check and clean a store.",
    epilog="[dim]Servers may go on using the store; a move for good ends with a last copy after they have stopped.[/]",
)


@app.command()
def backup(
    folder: Folder, store: StoreOption = "./promptd-data", blobs: BlobsOption = None, volatile: VolatileOption = False
) -> None:
    """Copy a store into a folder, which is a store itself; again and again into the same one: only what is new goes.

    [dim]promptd store backup /backup/promptd[/]
    [dim]PROMPTD_STORE=redis://:password@redis/0 promptd store backup /backup/promptd[/]
    """
    _copy(store, str(folder), blobs, None, volatile)


@app.command()
def restore(
    folder: Folder, store: StoreOption = "./promptd-data", blobs: BlobsOption = None, volatile: VolatileOption = False
) -> None:
    """Copy a backup into an empty store.

    [dim]promptd store restore /backup/promptd --store ./promptd-data[/]
    """
    if not (folder / "records.sqlite").exists():
        fail(f"{folder} is no backup", hint="promptd store backup DIR makes one.")
    _copy(str(folder), store, None, blobs, volatile)


@app.command()
def copy(
    source: Annotated[str, typer.Argument(help="From: a folder or a URL.", metavar="SRC")],
    target: Annotated[str, typer.Argument(help="To: empty, or an older copy.", metavar="DST")],
    source_blobs: Annotated[str | None, typer.Option(help="Where a Redis source keeps large files.")] = None,
    target_blobs: Annotated[str | None, typer.Option(help="Where a Redis target shall keep them.")] = None,
    volatile: VolatileOption = False,
) -> None:
    """Make one store a copy of another, of whatever kind, while servers use the first.

    [dim]promptd store copy ./promptd-data redis://redis/0[/]
    """
    _copy(source, target, source_blobs, target_blobs, volatile)


@app.command()
def verify(store: StoreOption = "./promptd-data", blobs: BlobsOption = None, volatile: VolatileOption = False) -> None:
    """Read everything and say what is lost or damaged, a line each; the status is 1 if anything is.

    [dim]promptd store verify --store redis://redis/0[/]
    """
    from promptd_store import find_faults

    async def check(opened: Store) -> int:
        num_faults = 0
        async for fault in find_faults(opened):
            out().print(fault, markup=False)
            num_faults += 1
        return num_faults

    num_faults = _with_store(store, blobs, volatile, check)
    if num_faults:
        fail(f"{num_faults} faults")
    err().print("[green]ok[/] every name, version and blob is there and whole")


@app.command()
def gc(
    store: StoreOption = "./promptd-data",
    blobs: BlobsOption = None,
    volatile: VolatileOption = False,
    keep_versions: Annotated[
        int | None, typer.Option(min=1, help="Also delete all but so many versions of each prompt.", metavar="N")
    ] = None,
    unused_days: Annotated[
        int | None,
        typer.Option(min=1, help="Also delete prompts, whole, that nobody has used for so many days.", metavar="D"),
    ] = None,
    min_age_hours: Annotated[
        float, typer.Option(min=0, help="Files younger than this stay: their writers may not be done.", metavar="H")
    ] = 24.0,
) -> None:
    """Delete what nobody needs: files without a name, and where asked for old versions and unused prompts.

    What a name points to stays, and what another prompt stands behind. A prompt is unused where no tenant has asked
    for it, alone or in a chain, on so many days, and nothing was published under its name.

    [dim]promptd store gc[/]
    [dim]promptd store gc --keep-versions 5 --unused-days 90[/]
    """
    from promptd_store import collect_garbage, scan_tenants
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from promptd.retention import Retention

    async def clean(opened: Store) -> list[int]:
        total = [0, 0, 0, 0]
        tenants = [tenant async for tenant in scan_tenants(opened)]
        console = out()
        columns = (SpinnerColumn(), TextColumn("{task.completed}/{task.total} tenants"), TimeElapsedColumn())
        # One console for both: the bar has to step aside for each line. Without a terminal there is no bar.
        with Progress(*columns, console=console, transient=True, disable=not err().is_terminal) as progress:
            task = progress.add_task("", total=len(tenants))
            retention = Retention(opened, keep_versions=keep_versions, unused_days=unused_days)
            if not await retention.look():
                err().print(f"[yellow]uses have not been noted for {unused_days} days yet: no prompt goes for that[/]")
            for tenant in tenants:
                pruned = await retention.apply(tenant)
                files = await collect_garbage(opened, tenant, unused_for_seconds=min_age_hours * 3600)
                left = await opened.sweep_blobs(tenant, older_than_seconds=min_age_hours * 3600)
                counts = [len(one) for one in (pruned.names, pruned.versions, files, left)]
                if any(counts):
                    console.print(f"{tenant}  {_counted(counts)}", markup=False)
                total = [before + count for before, count in zip(total, counts, strict=True)]
                progress.advance(task)
        return total

    out().print(f"deleted {_counted(_with_store(store, blobs, volatile, clean))}")


def _counted(counts: list[int]) -> str:
    names, versions, files, left = counts
    return (
        f"{names} prompts, {versions} versions, {files} files without a name, "
        f"{left} left behind by the dead or set aside long ago"
    )


def _copy(source: str, target: str, source_blobs: str | None, target_blobs: str | None, volatile: bool) -> None:
    from promptd_store import copy_store

    def tell(done: Transferred) -> None:
        err().print(
            f"[dim]{done.num_blobs} files, {done.num_records} records, {done.num_events} events, "
            f"{done.num_deleted} deletions[/]"
        )
        if done.num_missing:
            err().print(f"[yellow]{done.num_missing} files are lost in the source: promptd store verify names them[/]")

    async def copy_into(opened: Store) -> Transferred:
        other = await _open(target, target_blobs, volatile)
        try:
            return await copy_store(opened, other, on_pass=tell)
        finally:
            await other.close()

    if not _with_store(source, source_blobs, volatile, copy_into).is_still:
        fail("the source is written to faster than it is copied", hint="Stop its writers and run this again.")
    err().print("[green]ok[/] the target is what the source was a moment ago")


async def _open(address: str, blobs: str | None, volatile: bool) -> Store:
    from promptd_store import open_store

    return await open_store(
        address,
        blobs=blobs,
        allow_volatile=volatile,
        on_fault=lambda fault: err().print(f"[yellow]{fault}[/]"),
    )


def _with_store(address: str, blobs: str | None, volatile: bool, work: Callable[[Store], Awaitable[T]]) -> T:
    from promptd_store import StoreError

    async def run() -> T:
        opened = await _open(address, blobs, volatile)
        try:
            return await work(opened)
        finally:
            await opened.close()

    try:
        return asyncio.run(run())
    except StoreError as error:
        fail(str(error))
