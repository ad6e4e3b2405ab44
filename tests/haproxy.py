"""A real HAProxy with the configuration that is shipped, in front of servers on loopback."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from tests.redis_server import free_port, program

CONFIG = Path(__file__).parents[1] / "docker" / "haproxy.cfg"


def configured(ports: Sequence[int], bind: int, metrics: int, *, retries: bool) -> str:
    """The shipped configuration with these servers for the containers' names; `retries` False sends nothing twice."""
    text = CONFIG.read_text()
    servers = "\n".join(f"    server replica{number} 127.0.0.1:{port}" for number, port in enumerate(ports))
    text, num_templates = re.subn(r"^    server-template .*$", servers, text, flags=re.MULTILINE)
    text, num_binds = re.subn(
        r"bind :(8080|8404)", lambda found: f"bind 127.0.0.1:{bind if found[1] == '8080' else metrics}", text
    )
    text = text.replace(" resolvers docker init-addr libc,none", "")
    text = text[: text.index("resolvers docker")]
    assert (num_templates, num_binds) == (2, 2)
    if not retries:
        text = text.replace("retries 2", "retries 0").replace("    option redispatch\n", "")
    return text


@contextlib.contextmanager
def running_haproxy(folder: Path, ports: Sequence[int], *, retries: bool = True) -> Iterator[str]:
    """Its address, for a block."""
    folder.mkdir(parents=True, exist_ok=True)
    bind = free_port()
    (folder / "haproxy.cfg").write_text(configured(ports, bind, free_port(), retries=retries))
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen(
            [program("haproxy"), "-db", "-f", folder / "haproxy.cfg"], stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{bind}"
    try:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                    break
            assert process.poll() is None, (folder / "haproxy.log").read_text()
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait(20)
