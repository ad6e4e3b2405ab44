"""What `promptd serve` and `promptd worker` start with: the settings, and who ends them."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptd.commands.console import fail

if TYPE_CHECKING:
    from promptd.settings import Settings

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

StoreAddress = Annotated[
    str | None,
    typer.Option(
        help="Folder (./promptd-data), or redis://, rediss:// or redis+sentinel:// for several servers. "
        "A password belongs in PROMPTD_STORE: others can read a command line.",
        metavar="DIR_OR_URL",
    ),
]
BlobsAddress = Annotated[
    str | None,
    typer.Option(
        help="With redis://: where files of more than 1 MiB go, a folder that all servers see or s3://bucket/folder. "
        "Default: Redis keeps all.",
        metavar="DIR_OR_URL",
    ),
]
AllowVolatileStore = Annotated[
    bool | None,
    typer.Option("--allow-volatile-store", help="Take a Redis that may lose what was acknowledged."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="Threads that compute on the CPU (one for each processor): fewer where others compute there, too.",
        metavar="N",
    ),
]


def read_settings(given: dict[str, Any]) -> Settings:
    """Read the settings, the command line's first; a bad one ends the command with its name."""
    from pydantic import ValidationError

    from promptd.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        lines = [f"{_option(one['loc'])}{one['msg'].removeprefix('Value error, ')}" for one in error.errors()]
        fail("; ".join(lines), hint="Options come from the command line or from PROMPTD_… in the environment.")


def _option(place: tuple[int | str, ...]) -> str:
    """Return what a fault is about, for its front; nothing where several settings together are at fault."""
    return f"--{'.'.join(map(str, place)).replace('_', '-')}: " if place else ""


def shown_store(settings: Settings) -> str:
    """Return where the store lies, for people: without its password."""
    from promptd_store import shown_address

    return shown_address(settings.store)


def listen(host: str, port: int, option: str = "--port") -> socket.socket:
    """Take a port before the model is loaded, so that a taken one is known at once."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With its protocol, which connections inherit: asyncio sends small answers without delay (TCP_NODELAY) only
        # where it knows that they are TCP. Else every answer on a kept connection waits 40 ms for the client's ACK.
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        fail(
            f"{host}:{port} cannot be used: {error.strerror or error}",
            hint=f"Another server may be running there; {option} takes another port, 0 any free one.",
        )
    return listener


def shown_address_of(listener: socket.socket) -> str:
    """Return where a socket listens, for people and their browsers."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def on_first_signal(act: Callable[[signal.Signals], None]) -> None:
    """Call `act` with the first SIGTERM or SIGINT; a second one ends the process where it stands."""
    loop = asyncio.get_running_loop()

    def on_signal(which: signal.Signals) -> None:
        for one in STOP_SIGNALS:
            loop.remove_signal_handler(one)
            signal.signal(one, signal.SIG_DFL)
        act(which)

    for one in STOP_SIGNALS:
        loop.add_signal_handler(one, on_signal, one)


def stop_signal() -> asyncio.Event:
    """Return what SIGTERM or SIGINT sets; a second signal ends the process at once."""
    stop = asyncio.Event()
    on_first_signal(lambda which: stop.set())
    return stop
