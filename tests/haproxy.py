"""A real HAProxy with the configuration that is shipped, in front of servers on loopback."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.ports import free_port
from tests.redis_server import program

START_SECONDS = 60
CONFIG = Path(__file__).parents[1] / "docker" / "haproxy.cfg"


def configured(ports: Sequence[int], bind: int, metrics: int, *, retries: bool, checks: bool = True) -> str:
    """The shipped configuration with these servers for the containers' names.

    Without `retries` it sends nothing twice, without `checks` it never asks a server how it is.
    """
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
    if not checks:
        text, num_checks = re.subn(r"^    default-server check .*$", "", text, flags=re.MULTILINE)
        assert num_checks == 2
    return text


@dataclass(frozen=True)
class HAProxy:
    """A running one."""

    url: str
    metrics_url: str
    process: subprocess.Popen[bytes]

    def until_up(self, *numbers: int) -> None:
        """Wait until it sends requests to these servers, numbered as their ports were given."""
        wanted = [
            f'haproxy_server_status{{proxy="{backend}",server="replica{number}",state="UP"}} 1'
            for number in numbers
            for backend in ("by_load", "by_prompt")
        ]
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                found = httpx.get(self.metrics_url, timeout=START_SECONDS).text
                if all(line in found for line in wanted):
                    return
            assert self.process.poll() is None
            time.sleep(0.02)
        raise AssertionError(f"after {START_SECONDS} s HAProxy does not see servers {numbers} up")


@contextlib.contextmanager
def running_haproxy(
    folder: Path, ports: Sequence[int], *, retries: bool = True, checks: bool = True
) -> Iterator[HAProxy]:
    """Run it for a block, which begins when it sees all servers up."""
    folder.mkdir(parents=True, exist_ok=True)
    bind, metrics = free_port(), free_port()
    (folder / "haproxy.cfg").write_text(configured(ports, bind, metrics, retries=retries, checks=checks))
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen(
            [program("haproxy"), "-db", "-f", folder / "haproxy.cfg"], stdout=log, stderr=subprocess.STDOUT
        )
    made = HAProxy(f"http://127.0.0.1:{bind}", f"http://127.0.0.1:{metrics}/metrics", process)
    try:
        made.until_up(*range(len(ports)))
        yield made
    finally:
        process.kill()
        process.wait(20)
