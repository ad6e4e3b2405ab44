"""Limits over HTTP, as OpenAI's SDK meets them, and the ledger against the sum of all answers' `usage`."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx
import openai
import pytest
from promptd_client import Client, QuotaError, RateLimitError
from typer.testing import CliRunner, Result

from promptd.cli import app
from tests.api.conftest import ADMIN_KEY, MODEL, LiveServer
from tests.engine.harness import library
from tests.patience import until

ASK = {"model": MODEL, "prompt": [5, 6, 7, 8, 9], "max_tokens": 3, "temperature": 0, "extra_body": {"ignore_eos": True}}


class Sdk(Protocol):
    """Makes OpenAI's clients."""

    def __call__(self, key: str, *, max_retries: int = 0, sent: list[int] | None = None) -> openai.OpenAI:
        """Make one; `sent` takes the status of every answer that it gets."""


@pytest.fixture
def sdk(tenanted: LiveServer) -> Iterator[Sdk]:
    """OpenAI's clients, closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(key: str, *, max_retries: int = 0, sent: list[int] | None = None) -> openai.OpenAI:
            statuses = [] if sent is None else sent
            hooks: dict[str, Any] = {"response": [lambda answer: statuses.append(answer.status_code)]}
            http = stack.enter_context(httpx.Client(event_hooks=hooks))
            return openai.OpenAI(base_url=f"{tenanted.url}/v1", api_key=key, max_retries=max_retries, http_client=http)

        yield make


@pytest.fixture
def minute(tenanted: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One minute that lasts as long as the test: limits belong to minutes."""
    monkeypatch.setattr(tenanted.app.state.services.gate.rates, "_clock", lambda: 1_800_000_001.0)


@pytest.mark.usefixtures("minute")
def test_requests_per_minute(tenanted: LiveServer, admin: Client, sdk: Sdk) -> None:
    """Exactly so many of a burst, all others 429 with Retry-After; the headers count down; another tenant is free."""
    key, other = admin.keys.create("slow").key, admin.keys.create("free").key
    admin.tenants.set("slow", requests_per_minute=20)

    def ask(_: int) -> httpx.Response:
        with tenanted.http(Authorization=f"Bearer {key}") as http:
            return http.post("/v1/completions", json={"model": MODEL, "prompt": [5, 6], "max_tokens": 1})

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    assert Counter(answer.status_code for answer in answers) == {200: 20, 429: 20}
    remaining = sorted(int(a.headers["x-ratelimit-remaining-requests"]) for a in answers if a.status_code == 200)
    assert remaining[0] == 0
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "20"
        assert 0 < float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert answer.json()["error"]["code"] == "requests_per_minute_exceeded"
    with tenanted.http(Authorization=f"Bearer {other}") as http:
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": [5, 6], "max_tokens": 1})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
    with pytest.raises(openai.RateLimitError):
        sdk(key).completions.create(**ASK)  # type: ignore[call-overload]
    with Client(tenanted.url, api_key=key, max_retries=0) as client, pytest.raises(RateLimitError):
        client.models()
    admin.tenants.set("slow", requests_per_minute=None)  # here at once
    with Client(tenanted.url, api_key=key) as client:
        assert client.models()


@pytest.mark.usefixtures("minute")
def test_tokens_per_minute(tenanted: LiveServer, admin: Client, sdk: Sdk) -> None:
    """The most that a request can use is reserved, the rest is given back; one that can never fit is not repeated."""
    key = admin.keys.create("wordy").key
    admin.tenants.set("wordy", tokens_per_minute=100)
    client = sdk(key)
    for number in range(5):  # 8 of 100 each: 5 in, 3 out
        raw = client.completions.with_raw_response.create(**ASK)  # type: ignore[call-overload]
        assert int(raw.headers["x-ratelimit-remaining-tokens"]) == 100 - 8 * (number + 1)
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(**{**ASK, "max_tokens": 60})  # type: ignore[call-overload]
    assert refused.value.code == "tokens_per_minute_exceeded"
    stopped = {**ASK, "max_tokens": 50, "stop": ["e", "a", "t", "o"], "extra_body": {}}
    used = client.completions.create(**stopped).usage.total_tokens  # type: ignore[call-overload]
    rates = tenanted.app.state.services.gate.rates
    until(lambda: rates.reading("wordy", "tokens", 100).remaining == 60 - used)  # the answer was sent before
    raw = client.completions.with_raw_response.create(**ASK)  # type: ignore[call-overload]
    assert int(raw.headers["x-ratelimit-remaining-tokens"]) == 100 - 40 - used - 8
    sent: list[int] = []
    with pytest.raises(openai.RateLimitError) as never:
        sdk(key, max_retries=3, sent=sent).completions.create(**{**ASK, "max_tokens": 200})  # type: ignore[call-overload]
    assert never.value.code == "too_many_tokens_at_once"
    assert sent == [429]
    with Client(tenanted.url, api_key=key, max_retries=3) as own, pytest.raises(QuotaError):
        own.complete([5, 6, 7], model=MODEL, max_tokens=200)


def test_concurrent_requests(tenanted: LiveServer, admin: Client) -> None:
    """One at a time; a stream counts until its end, also one whose reader has gone."""
    key = admin.keys.create("narrow").key
    admin.tenants.set("narrow", max_concurrent_requests=1)
    body = {"model": MODEL, "prompt": [[5, 6]] * 8, "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 16}
    short = {"model": MODEL, "prompt": [5, 6], "max_tokens": 1}
    with tenanted.http(Authorization=f"Bearer {key}") as http:
        with http.stream("POST", "/v1/completions", json=body) as streamed:
            lines = streamed.iter_lines()  # kept: an iterator that is dropped closes its connection
            next(lines)
            refused = http.post("/v1/completions", json=short)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "too_many_concurrent_requests"
            assert refused.headers["retry-after"] == "1"
            assert http.get("/v1/models").status_code == 200  # no inference
        until(lambda: http.post("/v1/completions", json=short).status_code == 200)
        for _ in range(20):  # errors leave too
            assert http.post("/v1/completions", content=b"{broken").status_code == 400
        assert http.post("/v1/completions", json=short).status_code == 200


def test_the_ledger_is_the_sum_of_what_was_answered(tenanted: LiveServer, admin: Client, sdk: Sdk) -> None:
    """Plain, streamed, chained, several inputs and choices, labels, under two keys: equal to the token."""
    issued = [admin.keys.create("counted") for _ in range(2)]
    clients = [sdk(one.key) for one in issued]
    with Client(tenanted.url, api_key=issued[0].key) as owner:
        for number in range(3):
            owner.prompts.upload(f"p{number}", library(tenanted.folder)[number].content)
    expected: dict[tuple[str, str], Counter[str]] = {}

    def note(number: int, prompt: str, usage: Any) -> None:
        counts = expected.setdefault((issued[number].id, prompt), Counter())
        plain = usage if isinstance(usage, dict) else usage.model_dump()
        counts["requests"] += 1
        counts["prompt_tokens"] += plain["prompt_tokens"]
        counts["completion_tokens"] += plain["completion_tokens"]
        counts["virtual_tokens"] += plain["prompt_tokens_details"]["virtual_tokens"]
        counts["cached_tokens"] += plain["prompt_tokens_details"]["cached_tokens"]

    for number, client in enumerate(clients):
        for model, extra in ((MODEL, {}), ("p0", {"n": 2}), ("p1", {"prompt": [[5, 6, 7], [8, 9]], "n": 2})):
            answer = client.completions.create(**{**ASK, "model": model, **extra})  # type: ignore[call-overload]
            note(number, "" if model == MODEL else model, answer.usage)
        for chunk in client.completions.create(**ASK, stream=True, stream_options={"include_usage": True}):  # type: ignore[call-overload]
            if chunk.usage is not None:
                note(number, "", chunk.usage)
    with tenanted.http(Authorization=f"Bearer {issued[1].key}") as http:
        plain = {"prompt": [5, 6, 7], "max_tokens": 4}
        answer = http.post("/v1/completions", json={**plain, "prompt_ids": ["p0", "p2"]}).json()
        note(1, "p2", answer["usage"])
        labels = {"model": "p2", "input": ["one", "two"], "labels": ["yes", "no"]}
        note(1, "p2", http.post("/v1/classify", json=labels).json()["usage"])
        assert http.post("/v1/completions", json={**plain, "max_tokens": -1}).status_code == 400  # costs nothing

    def found() -> dict[tuple[str, str], Counter[str]]:
        return {
            (one.key_id, one.prompt): Counter({name: getattr(one, name) for name in next(iter(expected.values()))})
            for one in admin.tenants.usage("counted").data
            if one.key_id  # else it is what lies in the store
        }

    seen: dict[tuple[str, str], Counter[str]] = {}

    def is_written() -> bool:  # the last answer was sent before it was counted
        seen.update(found())
        return seen == expected

    until(is_written, (seen, expected), seconds=20)
    with Client(tenanted.url, api_key=issued[0].key) as owner:
        assert owner.usage().total == admin.tenants.usage("counted").total
        assert owner.usage(first_day="1999-01-01", last_day="1999-01-02").data == ()
    with Client(tenanted.url, api_key=admin.keys.create("nothing").key) as other:
        assert other.usage().data == ()
    everybody = admin.tenants.usage()
    assert {"counted"} <= {one.tenant for one in everybody.data}


def test_limits_are_set_shown_and_checked(tenanted: LiveServer, admin: Client) -> None:
    """Set in parts, shown whole, audited; a wrong one names its field and changes nothing."""
    assert admin.tenants.get("new").limits.requests_per_minute is None
    admin.tenants.set("new", weight=2.5, tokens_per_minute=7)
    changed = admin.tenants.set("new", tokens_per_minute=None, requests_per_minute=3)
    assert (changed.limits.weight, changed.limits.tokens_per_minute, changed.limits.requests_per_minute) == (
        2.5,
        None,
        3,
    )
    assert "new" in {tenant.id for tenant in admin.tenants.list()}
    with tenanted.http(Authorization=f"Bearer {ADMIN_KEY}") as http:
        for body, param in (
            ({"weight": 0}, "weight"),
            ({"weight": "2"}, "weight"),
            ({"requests_per_minute": -1}, "requests_per_minute"),
            ({"requests_per_minute": 1.5}, "requests_per_minute"),
            ({"requests_per_hour": 1}, "requests_per_hour"),
        ):
            refused = http.patch("/admin/tenants/new", json=body)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == param
        assert http.patch("/admin/tenants/public", json={"weight": 2}).status_code == 409
        assert http.get("/admin/usage", params={"from": "2026-02-01", "to": "2026-01-01"}).status_code == 400
    assert admin.tenants.get("new") == changed


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.long)])
def test_apply(tenanted: LiveServer, admin: Client, tmp_path: Path, count: int) -> None:
    """Many tenants from one file: applied once, changing nothing the second time; `--diff` only tells."""
    file = tmp_path / "tenants.yaml"
    lines = [f"  team-{n}: {{weight: {1 + n % 3}, requests_per_minute: {100 + n}}}" for n in range(count)]
    file.write_text("\n".join(["tenants:", *lines]))

    def apply(*options: str) -> Result:
        words = ["apply", str(file), "--url", tenanted.url, "--api-key", ADMIN_KEY, *options]
        return CliRunner().invoke(app, words)

    told = apply("--diff")
    assert (told.exit_code, told.stdout.count("requests_per_minute: none ->")) == (1, count)
    assert "team-7" not in {tenant.id for tenant in admin.tenants.list()}
    assert f"{count} of {count} tenants changed" in apply().stderr
    assert admin.tenants.get("team-7").limits.requests_per_minute == 107
    again = apply("--diff")
    assert (again.exit_code, again.stdout) == (0, "")
    admin.tenants.set("team-7", tokens_per_minute=5)
    file.write_text("\n".join(["tenants:", *lines[:7], "  team-7:", *lines[8:]]))
    assert apply().stdout.splitlines() == [
        "team-7  weight: 2.0 -> 1.0",
        "team-7  requests_per_minute: 107 -> none",
        "team-7  tokens_per_minute: 5 -> none",
    ]
    file.write_text("tenants: {team-7: {requests: 5}}")
    assert "requests" in apply().stderr
    for text in ("[1, 2]", "tenants: 5", "tenants: {1: {}}", "tenants: {a: 5}", "tenants: {a: {", "other: {}"):
        file.write_text(text)
        refused = apply()
        assert refused.exit_code == 1
        assert isinstance(refused.exception, SystemExit)  # one line, no traceback


def test_the_default_path_takes_no_step_in_the_store(tenanted: LiveServer, admin: Client) -> None:
    """A tenant without limits: 50 requests cost the store no transaction but the ledger's, once a second."""
    key = admin.keys.create("plain").key
    store = tenanted.app.state.services.catalog.store
    transact, steps = store.transact, []

    async def counting(*arguments: Any, **options: Any) -> dict[str, str]:
        if "plain" in f"{arguments}{options}":  # the tenant's: what the server does for itself is not asked here
            steps.append(time.monotonic())
        return await transact(*arguments, **options)  # type: ignore[no-any-return]

    store.transact = counting
    try:
        began = time.monotonic()
        with tenanted.http(Authorization=f"Bearer {key}") as http:
            for _ in range(50):
                answer = http.post("/v1/completions", json={"model": MODEL, "prompt": [5, 6], "max_tokens": 1})
                assert answer.status_code == 200
        seconds = time.monotonic() - began
    finally:
        store.transact = transact
    print(json.dumps({"requests": 50, "seconds": round(seconds, 2), "transactions": len(steps)}))
    assert len(steps) <= 3 + 2 * seconds
