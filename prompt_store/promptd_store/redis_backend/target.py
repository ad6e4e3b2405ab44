"""Where Redis is: `redis://`, `rediss://` (TLS), `redis+sentinel://` and `rediss+sentinel://` as plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from promptd_store.errors import StoreAddressError

SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel")
DEFAULT_PREFIX = "promptd:"
DEFAULT_PORT, DEFAULT_SENTINEL_PORT = 6379, 26379
SOCKET_SECONDS = 3.0
"""How long Redis may keep one reply to itself before the connection counts as dead."""

_PREFIX = re.compile(r"[A-Za-z0-9._:/-]{1,64}", re.ASCII)
_TLS_OPTIONS = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")


@dataclass(frozen=True)
class RedisTarget:
    """One parsed address."""

    hosts: tuple[tuple[str, int], ...]
    """The server, or the sentinels."""
    service: str | None = None
    """Sentinel's name for the primary; None without Sentinel."""
    prefix: str = DEFAULT_PREFIX
    num_replicas: int = 0
    """Replicas that must have a write before it is acknowledged (WAIT)."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Of a connection, in redis-py's words; holds the password."""
    sentinel_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def shown(self) -> str:
        """The address for people: no user, no password."""
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        scheme = "rediss" if self.options.get("ssl") else "redis"
        if self.service is not None:
            return f"{scheme}+sentinel://{hosts}/{self.service}/{self.options['db']}"
        return f"{scheme}://{hosts}/{self.options['db']}"


def parse_target(address: str) -> RedisTarget:
    """Read `redis[s]://[user:password@]host[:port][/db]` or `redis[s]+sentinel://[…@]host[,host…]/service[/db]`.

    Options after `?`: prefix, replicas, socket_timeout, sentinel_username, sentinel_password, ssl_ca_certs,
    ssl_ca_path, ssl_certfile, ssl_keyfile, ssl_check_hostname. Raises `StoreAddressError`, without the password.
    """
    parts = urlsplit(address)
    if parts.scheme not in SCHEMES:
        raise StoreAddressError(f"scheme {parts.scheme!r} is not one of {', '.join(SCHEMES)}")
    is_tls, is_sentinel = parts.scheme.startswith("rediss"), parts.scheme.endswith("+sentinel")
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    login, _, places = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    port = DEFAULT_SENTINEL_PORT if is_sentinel else DEFAULT_PORT
    hosts = tuple(_host(one, port) for one in places.split(","))
    if len(hosts) > 1 and not is_sentinel:
        raise StoreAddressError("several hosts need redis+sentinel://")
    path = [one for one in parts.path.split("/") if one]
    service = None
    if is_sentinel:
        if not path:
            raise StoreAddressError("redis+sentinel:// needs the primary's name: …/service")
        service = unquote(path.pop(0))
    options: dict[str, Any] = {"db": _number("db", path.pop(0) if path else "0")}
    if path:
        raise StoreAddressError(f"path {parts.path!r} has too many parts")
    options["socket_timeout"] = _seconds(given.pop("socket_timeout", str(SOCKET_SECONDS)))
    for name, value in (("username", user), ("password", password)):
        if value:
            options[name] = unquote(value)
    sentinel_options: dict[str, Any] = {
        name: given.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in given
    }
    if is_tls:
        tls: dict[str, Any] = {"ssl": True, **{name: given.pop(name) for name in _TLS_OPTIONS if name in given}}
        if "ssl_check_hostname" in tls:
            tls["ssl_check_hostname"] = tls["ssl_check_hostname"].lower() not in ("0", "no", "false")
        options.update(tls)
        sentinel_options.update(tls)
    prefix = given.pop("prefix", DEFAULT_PREFIX)
    if not _PREFIX.fullmatch(prefix):
        raise StoreAddressError(f"prefix {prefix!r} must be 1 to 64 letters, digits, '.', '_', ':', '/' or '-'")
    num_replicas = _number("replicas", given.pop("replicas", "0"))
    if given:
        raise StoreAddressError(f"unknown option {min(given)!r}")
    return RedisTarget(hosts, service, prefix, num_replicas, options, sentinel_options)


def _host(text: str, default_port: int) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([^\]]+)\]|([^:\[\]]*))(?::([0-9]{1,5}))?", text)
    if match is None or int(match[3] or 0) > 65535:
        raise StoreAddressError(f"host {text!r} is not host or host:port")
    return unquote(match[1] or match[2] or "127.0.0.1"), int(match[3] or default_port)


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise StoreAddressError(f"{name} {text!r} is not a number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 60:
        raise StoreAddressError(f"socket_timeout {text!r} is not between 0.05 and 60 seconds")
    return seconds
