"""JSON bodies, read strictly: UTF-8, no key twice, no NaN or Infinity, no lone surrogates, no abyss of brackets."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

from fastapi import Request

from promptd.errors import InvalidRequestError

MAX_INLINE_BYTES = 1 << 20
"""A larger body is parsed in a thread: other requests have their turns meanwhile."""
_MAX_SHOWN = 80
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictJsonRequest(Request):
    """A request whose `json()` raises `InvalidRequestError`, code `invalid_json`."""

    async def json(self) -> Any:
        """Parse the body."""
        body = await self.body()
        return parse(body) if len(body) <= MAX_INLINE_BYTES else await asyncio.to_thread(parse, body)


def parse(body: bytes) -> Any:
    """Read one JSON value."""
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # half a pair would break whatever writes it out later
    except json.JSONDecodeError as error:
        raise _invalid(f"{error.msg} at character {error.pos}") from error
    except UnicodeDecodeError as error:
        raise _invalid(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise _invalid(f"it has the lone surrogate {error.object[error.start]!r}") from error
    except RecursionError as error:
        raise _invalid("it is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise _invalid("it has a number with too many digits") from error
    return value


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items:
        if key in found:
            raise _invalid(f"it has the key {_shown(key)} twice")
        found[key] = value
    return found


def _constant(token: str) -> float:
    raise _invalid(f"{token} is not JSON")


def _finite(token: str) -> float:
    number = float(token)
    return number if math.isfinite(number) else _constant(_shown(token))


def _shown(text: str) -> str:
    return repr(text[:_MAX_SHOWN])


def _invalid(why: str) -> InvalidRequestError:
    return InvalidRequestError(f"the body is not valid JSON: {why}", code="invalid_json")
