"""`promptd doctor`: is everything there that serving needs? One clear line for each question."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from promptd.commands.console import ApiKey, BaseModel, err, out, quiet_loading
from promptd.commands.launch import read_settings

Verdict = Literal["ok", "warn", "FAIL"]
_COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question."""

    verdict: Verdict
    question: str
    answer: str


def doctor(
    model: BaseModel = None,
    store: Annotated[str | None, typer.Option(help="Folder or URL of the store.", metavar="DIR_OR_URL")] = None,
    host: Annotated[str | None, typer.Option(help="Address that would be listened on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port that would be listened on.")] = None,
    url: Annotated[
        str | None, typer.Option("--url", envvar="PROMPTD_URL", help="A server that should be reachable.")
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """Check this machine, one line a question; the status is 1 if anything would keep the server from starting.

    [dim]promptd doctor --model ./my-model[/]
    [dim]promptd doctor --url https://prompts.example.com[/]
    """
    settings = read_settings({})
    at = (host or settings.host, settings.port if port is None else port)
    questions: list[Callable[[], Finding]] = [
        check_python,
        check_torch,
        lambda: check_device(settings.threads),
        check_kernels,
        lambda: check_model(model or settings.model),
        lambda: check_store(store or settings.store, settings.blobs, settings.allow_volatile_store),
        lambda: check_port(*at),
    ]
    if url is not None:
        questions.append(lambda: check_server(url, api_key))
    failed = 0
    for question in questions:
        with err().status("checking …"):
            found = question()
        failed += found.verdict == "FAIL"
        colour = _COLOURS[found.verdict]
        out().print(f"[{colour}]{found.verdict:<4}[/]  [bold]{found.question:<7}[/] {found.answer}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def check_python() -> Finding:
    """Is it new enough, and does it live in an environment of its own?"""
    answer = f"{platform.python_version()} ({sys.executable})"
    return Finding("ok" if sys.version_info >= (3, 11) else "FAIL", "python", answer)


def check_torch() -> Finding:
    """Can torch be imported, and is it a version that the engine knows?"""
    try:
        import torch
        import transformers
    except ImportError as error:
        return Finding("FAIL", "torch", f"{error}; ./server/run installs it")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    answer = f"{torch.__version__}, transformers {transformers.__version__}"
    if release < (2, 11):
        return Finding("FAIL", "torch", f"{answer}; 2.11 or newer is needed")
    return Finding("ok", "torch", answer)


def check_device(threads: int | None = None) -> Finding:
    """What will compute?"""
    try:
        import torch

        from promptd.processors import num_processors, use_threads
    except ImportError:
        return Finding("FAIL", "device", "unknown without torch")
    if not torch.cuda.is_available():
        use_threads(threads)
        return Finding("ok", "device", f"CPU, {num_processors()} processors, {torch.get_num_threads()} threads")
    free, total = torch.cuda.mem_get_info()
    return Finding("ok", "device", f"{torch.cuda.get_device_name()}, {free >> 20} of {total >> 20} MiB free")


def check_kernels() -> Finding:
    """Are the CPU's own kernels compiled?"""
    try:
        import torch

        from promptd.modeling.compiled_linear import can_compile
        from promptd.modeling.decode_kernel import decode_kernel
    except ImportError:
        return Finding("FAIL", "kernels", "unknown without torch")
    if torch.cuda.is_available():
        return Finding("ok", "kernels", "Triton's, compiled for the device at first use")
    if decode_kernel(torch.float32) is None or not can_compile(torch.float32):
        return Finding("warn", "kernels", "torch's: answers come slower than with ours, which need a C compiler (gcc)")
    return Finding("ok", "kernels", f"compiled for {torch.backends.cpu.get_cpu_capability()}")


def check_model(model: str | None) -> Finding:
    """Does the model load, and does it answer packed rows as transformers does?"""
    try:
        from promptd.demo import DEMO_MODEL_PATH
        from promptd.errors import PromptdError
        from promptd.modeling import load_model
    except ImportError as error:
        return Finding("FAIL", "model", str(error))
    quiet_loading()
    try:
        loaded = load_model(model or DEMO_MODEL_PATH)
    except (PromptdError, OSError, ValueError) as error:
        return Finding("FAIL", "model", str(error).splitlines()[0])
    spec = loaded.spec
    answer = f"{loaded.served_name}: {spec.architecture}, {spec.num_layers} layers of {spec.hidden_size}, "
    return Finding("ok", "model", answer + f"{spec.max_model_len} tokens, {spec.serving_dtype}; equals transformers")


def check_store(address: str, blobs: str | None = None, allow_volatile: bool = False) -> Finding:
    """Is the Redis there and safe, or can the folder be made and written to?"""
    from promptd_store import is_shared

    if is_shared(address) or blobs is not None:  # which a folder has no use for
        return check_shared_store(address, blobs, allow_volatile)
    return check_folder(Path(address))


def check_shared_store(address: str, blobs: str | None, allow_volatile: bool) -> Finding:
    """Does the Redis answer, would it keep what it acknowledges, and is the place for large files of use?"""
    from promptd_store import StoreError, VolatileStoreError, open_store, shown_address

    async def look() -> None:
        await (await open_store(address, blobs=blobs)).close()

    try:
        asyncio.run(look())
    except VolatileStoreError as error:
        return Finding("warn" if allow_volatile else "FAIL", "store", "; ".join(error.faults))
    except StoreError as error:
        return Finding("FAIL", "store", str(error))
    beside = "" if blobs is None else f"; large files in {blobs}"
    return Finding("ok", "store", f"{shown_address(address)} answers and keeps what it acknowledges{beside}")


def check_folder(folder: Path) -> Finding:
    """Can the store's folder be made and written to?"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"promptd")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Finding("FAIL", "store", f"{folder.resolve()}: {error.strerror or error}")
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    verdict: Verdict = "ok" if free > 1 << 30 else "warn"
    return Finding(verdict, "store", f"{folder.resolve()} is writable, {free / 1e9:.1f} GB free")


def check_port(host: str, port: int) -> Finding:
    """Is the port free, or is it a promptd server that has it?"""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except OSError as error:
        server = check_server(f"http://{host}:{port}", None, timeout_seconds=1)
        if server.verdict == "FAIL":
            return Finding("FAIL", "port", f"{host}:{port} cannot be used: {error.strerror or error}")
        return Finding("warn", "port", f"{host}:{port} is taken, by {server.answer}")
    return Finding("ok", "port", f"{host}:{port} is free")


def check_server(url: str, api_key: str | None, *, timeout_seconds: float = 5) -> Finding:
    """Does a server answer there, is it ready, and does it take the key?"""
    from promptd_client import Client, PromptdError

    try:
        with Client(url, api_key=api_key, timeout_seconds=timeout_seconds, max_retries=0) as client:
            answer = f"promptd {client.version()} at {client.base_url}"
            if not client.is_ready():
                return Finding("warn", "server", f"{answer}, not ready")
            return Finding("ok", "server", f"{answer}, ready, {len(client.models())} models and prompts")
    except PromptdError as error:
        return Finding("FAIL", "server", f"{url}: {error}")
