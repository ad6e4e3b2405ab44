"""Servers of a test's own on loopback: their ports, and what their clients need not read."""

from __future__ import annotations

import random
import socket
import ssl
from pathlib import Path

CLIENTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST = 10_000
NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients: each would read all certificates of this machine, which takes longer than its first requests."""
_given: set[int] = set()


def free_port() -> int:
    """A port that nobody has just now.

    Where it can be, it is none of those that the system gives to clients: one of them could take it before the server
    does, or while the server is away and to come back to the same port.
    """
    highest = int(CLIENTS.read_text().split()[0]) if CLIENTS.exists() else 0
    dice = random.SystemRandom()  # several runs of the tests at once must not think alike
    for port in dice.sample(range(LOWEST, highest), 100) if highest > 2 * LOWEST else [0] * 100:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found: int = probe.getsockname()[1]
        if found not in _given:
            _given.add(found)
            return found
    raise RuntimeError("there is no free port")
