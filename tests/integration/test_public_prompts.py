"""What tenants share on the device, end to end: public prompts, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from promptd_store import encode
from pydantic import SecretStr

from promptd.settings import Settings
from tests.api.conftest import MODEL, LiveServer, serve

TEXT = list(range(5, 45))


@pytest.fixture
def keyed(tiny_models: dict[str, Path], tmp_path: Path) -> Iterator[LiveServer]:
    """A server with two tenants and an admin."""
    settings = Settings(
        model=str(tiny_models["llama"]),
        store=str(tmp_path),
        api_keys=SecretStr("a:key-tenant-a,b:key-tenant-b"),
        admin_key=SecretStr("key-admin-1"),
        drain_seconds=0,
    )
    with serve(settings, tiny_models["llama"]) as live:
        yield live


def resident_after(live: LiveServer, key: str, *chain: str) -> int:
    """Virtual tokens on the device after a request, which must not find another's text."""
    with live.http(Authorization=f"Bearer {key}") as http:
        body = {"model": MODEL, "prompt_ids": list(chain), "prompt": TEXT, "max_tokens": 1}
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    engine = live.app.state.services.engine.engine
    return int(engine.prompts.num_bytes // engine.pool.bytes_per_slot)


def test_public_prompts_cost_their_kv_once(keyed: LiveServer) -> None:
    """Two tenants under one public prompt, alone and in front of an own one: its K/V is resident once and the texts
    are apart. A private prompt of equal content costs twice: what is in the cache tells no tenant about another."""
    a, b = "key-tenant-a", "key-tenant-b"
    shared, own = (
        encode("soft", torch.full((count, keyed.model.spec.hidden_size), 0.1 * count)).content for count in (9, 4)
    )
    with keyed.http(Authorization="Bearer key-admin-1") as admin:
        assert admin.put("/v1/prompts/tone?visibility=public", content=shared).status_code == 201
    for key in (a, b):
        with keyed.http(Authorization=f"Bearer {key}") as http:
            assert http.put("/v1/prompts/mine", content=own).status_code == 201
    tried = (
        9 + 4 + 4
    )  # each was tried out for whoever uploaded it, before anybody could see it, and lies under their salt
    assert resident_after(keyed, a, "tone") == tried + 9
    assert resident_after(keyed, b, "tone") == tried + 9
    assert resident_after(keyed, a, "tone", "mine") == tried + 9 + 4
    assert resident_after(keyed, b, "tone", "mine") == tried + 9 + 4 + 4
    assert resident_after(keyed, a, "mine") == tried + 17
    assert resident_after(keyed, b, "mine") == tried + 17
    assert resident_after(keyed, a, "mine", "tone") == tried + 17 + 9  # behind a private prompt nothing is public
