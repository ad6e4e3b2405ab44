"""`promptd prompts ls | show | pull | write | rm | rollback`: the prompts of a server, from the terminal."""

from __future__ import annotations

import io
import json
import sys
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptd.commands.console import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    Url,
    connected,
    err,
    fail,
    human_bytes,
    out,
    print_json,
    read_text,
)
from promptd.commands.push import push
from promptd.commands.shares import share, unshare
from promptd.commands.verify import verify

if TYPE_CHECKING:
    from promptd_client import Prompt

Name = Annotated[str, typer.Argument(help="Name of a prompt.")]
Ref = Annotated[str, typer.Argument(help="Name of a prompt, name@3 or name@sha256:…")]

PULLED_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="List, upload, download and roll back learned prompts.",
    epilog="[dim]The server's address and key can be set once: PROMPTD_URL and PROMPTD_API_KEY.[/]",
)
app.command(rich_help_panel="Upload")(push)
app.command(rich_help_panel="Upload")(verify)
app.command(rich_help_panel="Change")(share)
app.command(rich_help_panel="Change")(unshare)


@app.command("ls", rich_help_panel="Look")
def list_prompts(as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List your prompts, those that others share with you, and the public ones."""
    with connected(url, api_key) as client:
        prompts = client.prompts.list()
    if as_json:
        for prompt in prompts:
            print_json(prompt.model_dump(exclude={"manifest"}))
        return
    if not prompts:
        err().print("[dim]no prompts yet: promptd prompts push DIR[/]")
        return
    _print_table(prompts, ["name", "kind", "tokens", "size", "version", "owner", "age"])


@app.command(rich_help_panel="Look")
def show(name: Ref, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show one prompt: what it is, how it was made, and its versions."""
    with connected(url, api_key) as client:
        prompt = client.prompts.get(name)
        versions = client.prompts.versions(prompt.name)
    if as_json:
        print_json(prompt.model_dump() | {"versions": [one.version for one in versions]})
        return
    _print_fields(prompt)
    out().print()
    _print_table(versions, ["version", "kind", "tokens", "size", "age"])


@app.command(rich_help_panel="Look")
def pull(
    name: Ref,
    target: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to. Default: the prompt's name.", metavar="DIR")
    ] = None,
    native: Annotated[
        bool, typer.Option("--native", help="The file as it was uploaded, in place of a PEFT folder.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Download a prompt as a PEFT folder, bit for bit as it was uploaded."""
    with connected(url, api_key) as client:
        prompt = client.prompts.get(name)
        content = client.prompts.content(
            f"{prompt.name}@{prompt.version}" if "@" in name else name, format="native" if native else "peft"
        )
    bare_name = prompt.name.rpartition("/")[2]  # others' public prompts are called owner/name
    folder = target or Path(bare_name)
    files = {f"{bare_name}.safetensors": content} if native else _unpacked(content)
    present = [str(folder / each) for each in files if (folder / each).exists()]
    if present and not force:
        fail(f"{', '.join(present)} is there already", hint="--force writes over it, --out names another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, data in files.items():
        (folder / file_name).write_bytes(data)
        out().print(f"{folder / file_name}  {human_bytes(len(data))}", soft_wrap=True)


@app.command(rich_help_panel="Upload")
def write(
    name: Name,
    file: Annotated[Path, typer.Argument(help="A text file; - reads the standard input.", allow_dash=True)],
    template: Annotated[str | None, typer.Option(help="How an input reads behind it: 'Question: {text}'")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Publish a plain text as a prompt, a system prompt say: it stands in front of every input.

    `promptd jobs create --distill-prompt NAME --name NAME` puts virtual tokens that say the same in its place.
    """
    text = sys.stdin.read() if str(file) == "-" else read_text(file)
    with connected(url, api_key) as client:
        prompt = client.prompts.upload_text(name, text, template=template)
    out().print(f"{prompt.name} is v{prompt.number}  {prompt.version}", soft_wrap=True)


@app.command(rich_help_panel="Change")
def rm(
    names: Annotated[list[str], typer.Argument(help="Names of prompts.", metavar="NAME")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Delete prompts with all their versions."""
    if not yes:
        typer.confirm(f"Delete {', '.join(names)} with all versions?", abort=True)
    for name in names:
        with connected(url, api_key) as client:
            client.prompts.delete(name)
        out().print(f"deleted {name}", soft_wrap=True)


@app.command(rich_help_panel="Change")
def rollback(
    name: Name,
    to: Annotated[str, typer.Option(help="Version to go back to: its number, or sha256:…", metavar="N")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Point a name to an earlier version. Requests in flight finish on the version they started with."""
    with connected(url, api_key) as client:
        prompt = client.prompts.rollback(name, int(to) if to.isdecimal() else to)
    out().print(f"{prompt.name} is v{prompt.number}  {prompt.version}", soft_wrap=True)


def _unpacked(archive: bytes) -> dict[str, bytes]:
    """Read the two files of a PEFT archive; any other name in it is refused."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            names = zipped.namelist()
            if set(names) != PULLED_FILES:
                fail(f"the server sent {names}, expected {sorted(PULLED_FILES)}")
            return {name: zipped.read(name) for name in names}
    except zipfile.BadZipFile:
        fail("the server did not send a zip archive")


def _print_table(prompts: list[Prompt], columns: list[str]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("tokens", "size", "age") else "left", no_wrap=True)
    for prompt in prompts:
        cells = {
            "name": prompt.name,
            "kind": prompt.kind,
            "tokens": str(prompt.num_virtual_tokens),
            "size": human_bytes(prompt.num_bytes),
            "version": f"v{prompt.number} {prompt.version[:19]}"
            + (" [green]current[/]" if _marks(prompt, columns) else ""),
            "owner": prompt.owned_by + _seen_as(prompt),
            "age": _age(prompt.created),
        }
        table.add_row(*(cells[column] for column in columns))
    out().print(table)


def _seen_as(prompt: Prompt) -> str:
    if prompt.visibility == "public":
        return " (public)"
    return " (shared)" if "/" in prompt.name else ""


def _marks(prompt: Prompt, columns: list[str]) -> bool:
    """In a list of one prompt's versions, the current one is marked."""
    return prompt.is_current and "name" not in columns


def _print_fields(prompt: Prompt) -> None:
    from rich.markup import escape

    rows: list[tuple[str, Any]] = [
        ("name", prompt.name),
        ("version", f"v{prompt.number}  {prompt.version}"),
        ("kind", f"{prompt.kind}, {prompt.num_virtual_tokens} virtual tokens, {human_bytes(prompt.num_bytes)}"),
        ("behind", " > ".join(prompt.behind) or "nothing"),
        ("owner", f"{prompt.owned_by}, {prompt.visibility}"),
        ("base model", f"{prompt.base_fingerprint} ({'verified' if prompt.verified else 'not stated in the file'})"),
        ("created", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(prompt.created))),
    ]
    told = {"kind", "name", "version", "num_virtual_tokens", "tensors", "base_fingerprint"}
    told |= {"schema_version", "base_architecture"}
    for source in (prompt.manifest, prompt.provenance):
        rows += [(key, value) for key, value in source.items() if key not in told and value not in (None, [], {})]
        told |= source.keys()
    width = max(len(key) for key, _ in rows)
    for key, value in rows:
        first, *rest = [value] if isinstance(value, str) else _in_lines(value)
        out().print(f"[bold]{escape(key):<{width}}[/]  {escape(first)}", soft_wrap=True)
        for line in rest:
            out().print(f"{'':<{width}}  {escape(line)}", soft_wrap=True)


def _in_lines(value: Any) -> list[str]:
    """Write JSON for people: plain values side by side, whatever holds others on lines of its own."""
    if isinstance(value, dict) and any(isinstance(inner, dict | list) for inner in value.values()):
        plain = {key: inner for key, inner in value.items() if not isinstance(inner, dict | list)}
        lines = _in_lines(plain) if plain else []
        for key, inner in value.items():
            if key not in plain:
                below = _in_lines(inner)
                lines += [f"{key}: {below[0]}"] if len(below) == 1 else [f"{key}:", *(f"  {line}" for line in below)]
        return lines
    if isinstance(value, dict):
        return [", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner is not None)]
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return [line for inner in value for line in _in_lines(inner)]
    return [", ".join(map(_plain, value)) if isinstance(value, list) else _plain(value)]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False)


def _age(created: int) -> str:
    seconds = max(0, int(time.time()) - created)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
