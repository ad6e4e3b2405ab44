"""The client against a real server."""

from __future__ import annotations

import concurrent.futures
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from promptd_client import (
    AsyncClient,
    AuthenticationError,
    Client,
    ContextLengthError,
    InvalidArtifactError,
    InvalidRequestError,
    ModelNotFoundError,
    NoChatTemplateError,
    PreconditionFailedError,
    RouteNotFoundError,
)
from promptd_client._requests import Call

from tests.clients.conftest import Live

GREEDY = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(live: Live, adapters: Path) -> Iterator[Client]:
    """A client of a server that has the two PEFT prompts."""
    with live.client() as client:
        for name in ("soft", "prefix"):
            client.prompts.upload_peft(name, adapters / name)
        yield client


def test_prompts_change_answers(client: Client) -> None:
    """The bare model and both prompts answer differently, concurrently as alone."""
    names = ["tiny", "soft", "prefix"]
    alone = {name: client.complete("the quick", model=name, **GREEDY) for name in names}
    assert len({answer.text for answer in alone.values()}) == 3
    assert alone["soft"].usage is not None and alone["soft"].usage.virtual_tokens == 7
    assert alone["soft"].prompt_versions == [client.prompts.get("soft").version]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        mixed = list(pool.map(lambda name: client.complete("the quick", model=name, **GREEDY).text, names * 4))
    assert mixed == [alone[name].text for name in names] * 4


def test_a_text_as_a_prompt(client: Client, live: Live) -> None:
    """A plain text is published and asked like any prompt, in both clients."""
    made = client.prompts.upload_text("manual", "the quick brown fox", stop=["\n"])
    assert (made.kind, made.manifest["text"], made.manifest["stop"]) == ("text", "the quick brown fox", ["\n"])
    whole = client.complete("the quick brown fox jumps", **GREEDY)
    assert client.complete(" jumps", model="manual", **GREEDY).text == whole.text

    async def again() -> str:
        async with AsyncClient(live.url, api_key=live.key) as other:
            return (await other.prompts.upload_text("manual", "the quick brown fox", stop=["\n"])).version

    assert anyio.run(again) == made.version
    client.prompts.delete("manual")


def test_a_prompt_behind_another(client: Client) -> None:
    """What was uploaded behind a prompt is served behind it, under one name."""
    segment = client.prompts.content("soft")
    made = client.prompts.upload("chained", segment, behind=["prefix"])
    assert made.behind == [f"{made.owned_by}/prefix@{client.prompts.get('prefix').version}"]
    chain = client.complete("the quick", prompt_ids=["prefix", "soft"], **GREEDY)
    named = client.complete("the quick", model="chained", **GREEDY)
    assert (named.text, named.prompt_versions) == (chain.text, chain.prompt_versions)
    assert named.text != client.complete("the quick", model="soft", **GREEDY).text  # control
    client.prompts.delete("chained")


def test_streams_add_up(client: Client, live: Live) -> None:
    """A stream's parts are the whole text, in both clients, and its last event counts the tokens."""
    whole = client.complete("the quick", model="soft", **GREEDY)
    with client.stream("the quick", model="soft", **GREEDY) as stream:
        events = list(stream)
    assert "".join(event.text for event in events) == whole.text
    assert events[-1].usage is not None and events[-1].usage.completion_tokens == 8

    async def run() -> str:
        async with (
            AsyncClient(live.url, api_key=live.key) as other,
            await other.stream("the quick", model="soft", **GREEDY) as parts,
        ):
            return "".join([event.text async for event in parts])

    assert anyio.run(run) == whole.text


def test_a_stream_can_be_left(client: Client) -> None:
    """Leaving a stream early ends the request; the server goes on answering."""
    with client.stream("the quick", model="soft", max_tokens=200, ignore_eos=True) as stream:
        assert next(stream).choices
    assert client.complete("the quick", model="tiny", max_tokens=1).choices


def test_classification(client: Client) -> None:
    """Every input gets a label, and its probabilities add up to one."""
    result = client.classify(["the quick", "book a table"], model="soft", labels=[" fox", " dog"])
    assert len(result.labels) == 2 and set(result.labels) <= {" fox", " dog"}
    assert all(abs(sum(one.probabilities.values()) - 1) < 1e-6 for one in result.data)


def test_a_soft_prompt_in_words(client: Client) -> None:
    """Each virtual token has its nearest entries of the vocabulary, best first."""
    rows = client.prompts.neighbors("soft", count=3)
    assert [len(row) for row in rows] == [3] * 7
    assert all(sorted((near.cosine for near in row), reverse=True) == [near.cosine for near in row] for row in rows)
    assert client.detokenize([rows[0][0].token_id]) == rows[0][0].token


def test_address_and_key_of_the_environment(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Client()` goes where the command line goes; what is given counts before that."""
    monkeypatch.setenv("PROMPTD_URL", live.url)
    monkeypatch.setenv("PROMPTD_API_KEY", live.key)
    with Client() as client:
        assert client.models()
    with pytest.raises(AuthenticationError), Client(api_key="wrong-key-1", max_retries=0) as stranger:
        stranger.models()
    with Client("http://elsewhere") as elsewhere:
        assert elsewhere.base_url == "http://elsewhere"


def test_small_questions(client: Client) -> None:
    """Models, tokens, version and readiness."""
    models = {model.id: model for model in client.models()}
    assert models["tiny"].parent is None and models["soft"].parent == "tiny"
    tokens = client.tokenize("the quick brown fox")
    assert client.detokenize(tokens.tokens) == "the quick brown fox" and tokens.count == len(tokens.tokens)
    assert client.is_ready() and client.version().count(".") == 2


def test_versions_move(client: Client, adapters: Path) -> None:
    """Publish, publish again, roll back and delete; conditions are kept."""
    first = client.prompts.upload_peft("mover", adapters / "soft")
    again = client.prompts.upload_peft("mover", adapters / "soft")
    second = client.prompts.upload_peft("mover", adapters / "prefix", if_match=first.etag)
    assert (first.number, again.number, second.number) == (1, 1, 2)
    with pytest.raises(PreconditionFailedError):
        client.prompts.upload_peft("mover", adapters / "soft", if_match=first.etag)
    assert client.prompts.rollback("mover", 1).version == first.version
    assert [one.number for one in client.prompts.versions("mover") if one.is_current] == [1]
    assert "mover" in [prompt.name for prompt in client.prompts.list()]
    client.prompts.delete("mover")
    with pytest.raises(ModelNotFoundError):
        client.prompts.get("mover")


def test_content_is_what_was_uploaded(client: Client, adapters: Path) -> None:
    """A PEFT folder comes back byte for byte, both files."""
    for name in ("soft", "prefix"):
        with zipfile.ZipFile(io.BytesIO(client.prompts.content(name, format="peft"))) as zipped:
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                assert zipped.read(file) == (adapters / name / file).read_bytes()
        assert client.prompts.content(name) == (adapters / name / "adapter_model.safetensors").read_bytes()


def test_errors_are_typed(client: Client, live: Live) -> None:
    """The server's errors arrive as classes, with the field and the request's id."""
    with pytest.raises(ModelNotFoundError):
        client.complete("x", model="nobody")
    with pytest.raises(ContextLengthError):
        client.complete("x", max_tokens=100_000)
    with pytest.raises(InvalidRequestError) as caught:
        client.complete("x", temperature=-1)
    assert caught.value.param == "temperature" and caught.value.request_id
    with pytest.raises(InvalidArtifactError):
        client.prompts.upload("broken", b"not safetensors")
    with pytest.raises(NoChatTemplateError):
        client.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(RouteNotFoundError):
        client.run(Call("GET", "/v1/nothing", lambda response: None))
    with pytest.raises(AuthenticationError), Client(live.url, api_key="wrong-key-1", max_retries=0) as stranger:
        stranger.models()


def test_other_tenants_see_nothing(client: Client, live: Live) -> None:
    """Another tenant's key finds neither the name nor the list."""
    with Client(live.url, api_key="other-key-0001") as other:
        assert not [prompt for prompt in other.prompts.list() if prompt.owned_by == "acme"]
        with pytest.raises(ModelNotFoundError):
            other.complete("x", model="soft")
