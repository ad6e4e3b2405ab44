"""Hostile uploads over HTTP: each is refused with a 4xx of its own, at little cost, and the server serves on."""

from __future__ import annotations

import json
import random
import socket
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from promptd_store import ArtifactError, PromptKind, decode, encode, largest_file

from tests.api.conftest import MODEL, LiveServer
from tests.engine.harness import frozen, library
from tests.replicas import Replica, ReplicaForge
from tests.store.files import bare_file, native_file, prefix, soft
from tests.store.test_decode import REFUSED
from tests.store.test_header import HOSTILE

FITS_HERE = {"too long"}
"""The served model is longer than the one that these files were made for."""


def corpus() -> dict[str, bytes]:
    """Every hostile file that the store's own tests know."""
    files = {name: content for name, (content, _) in HOSTILE.items()}
    return files | {name: make() for name, (make, _) in REFUSED.items() if name not in FITS_HERE}


def test_the_corpus_is_refused(server: LiveServer) -> None:
    """4xx with a code, nothing stored, nothing slow; a good file in between is taken."""
    files, codes = corpus(), Counter[str]()
    good = library(server.folder)[0].content
    with server.http() as http:
        for name, content in files.items():
            answer = http.put("/v1/prompts/hostile", content=content)
            assert 400 <= answer.status_code < 500, (name, answer.text)
            codes[answer.json()["error"]["code"]] += 1
        assert http.get("/v1/prompts/hostile").status_code == 404
        assert http.put("/v1/prompts/hostile", content=good).status_code == 201  # the control
        assert http.delete("/v1/prompts/hostile").status_code == 200
        for name in ("..%2F..%2Fetc%2Fpasswd", "%2e%2e", ".hidden", "a%00b", "x" * 97, "a%0Ab"):
            answer = http.put(f"/v1/prompts/{name}", content=good)
            assert 400 <= answer.status_code < 500, (name, answer.text)
    assert len(files) >= 60
    print(json.dumps({"files": len(files), "codes": len(codes)}))


def test_a_refusal_is_cheap(server: LiveServer) -> None:
    """Time of the processor and memory of each refusal, in the decoder itself: the largest of the corpus."""
    spec = server.model.spec
    slowest, largest = 0.0, 0
    for name, content in corpus().items():
        tracemalloc.start()
        began = time.thread_time()
        with pytest.raises(ArtifactError):
            decode(content, spec)
        slowest = max(slowest, time.thread_time() - began)
        largest = max(largest, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert largest <= 32 << 20, name
    print(json.dumps({"cpu_ms": round(1e3 * slowest, 1), "memory_mb": round(largest / 1e6, 2)}))


def exchange(url: str, head: list[str], body: bytes = b"") -> tuple[int, int, bytes]:
    """Send a request byte for byte; return the status, how much of the body went out, and the answer."""
    host, _, port = url.removeprefix("http://").partition(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall("\r\n".join(["PUT /v1/prompts/raw HTTP/1.1", "Host: localhost", *head, "", ""]).encode())
        try:
            while sent < len(body):
                sent += connection.send(body[sent : sent + 4096])
        except OSError:  # the server has hung up on it
            pass
        answer = b""
        try:
            while b"}}" not in answer and (piece := connection.recv(1 << 16)):
                answer += piece
        except OSError:
            pass
    return int(answer.split()[1]) if answer else 0, sent, answer


def test_what_the_body_claims(server: LiveServer) -> None:
    """Too long, compressed, cut, endless: answered by the headers where they tell, else at the limit."""
    limit = largest_file(server.model.spec, None, 256)
    assert exchange(server.url, [f"Content-Length: {limit + 1}"])[0] == 413  # not a byte was sent
    assert exchange(server.url, ["Content-Length: " + "9" * 30])[0] in (400, 413)
    assert exchange(server.url, ["Content-Length: 10", "Content-Encoding: gzip"], b"0123456789")[0] == 400
    endless = f"{1 << 20:x}\r\n".encode() + bytes(limit + (16 << 20))
    status, sent, _ = exchange(server.url, ["Transfer-Encoding: chunked"], endless)
    assert status in (0, 400, 413) and sent < len(endless)
    with server.http() as http:
        small = largest_file(server.model.spec, PromptKind.SOFT, 256)
        assert small < limit
        told = http.put("/v1/prompts/raw", params={"kind": "soft"}, content=bytes(small + 1))
        assert (told.status_code, told.json()["error"]["code"]) == (413, "payload_too_large")
        assert http.get("/v1/prompts/raw").status_code == 404


def test_the_largest_files_fit(server: LiveServer) -> None:
    """The bytes that the shapes allow are not one too few: 255 virtual tokens of 32 bits, and a header beside."""
    spec, generator = server.model.spec, torch.Generator().manual_seed(1)
    shape = (spec.num_layers, 2, spec.num_kv_heads, 255, spec.head_dim)
    for kind, tensor in (
        (PromptKind.SOFT, 0.1 * torch.randn(255, spec.hidden_size, generator=generator)),
        (PromptKind.PREFIX, 0.1 * torch.randn(shape, generator=generator)),
    ):
        content = encode(kind, tensor).content
        assert len(content) <= largest_file(spec, kind, 255)
        with server.http() as http:
            answer = http.put("/v1/prompts/large", params={"kind": kind.value, "dry_run": True}, content=content)
            assert answer.status_code == 200, answer.text


class Mutator:
    """Makes files from good and bad ones: flipped, cut, spliced, with other lengths and numbers."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        good = [bare_file(soft()), bare_file(prefix(), name="prefix"), native_file({"kind": "soft"}, soft())]
        self.files = good * 20 + [one for one in corpus().values() if len(one) < 1 << 16]

    def __call__(self) -> bytes:
        """Make one."""
        dice = self.dice
        content = bytearray(dice.choice(self.files))
        for _ in range(dice.randint(1, 4)):
            at, kind = dice.randrange(len(content) + 1), dice.randrange(6)
            if kind == 0 and content:
                content[at % len(content)] ^= 1 << dice.randrange(8)
            elif kind == 1:
                del content[at:]
            elif kind == 2:
                content[at:at] = dice.randbytes(dice.randint(1, 64))
            elif kind == 3:
                content[at:] = dice.choice(self.files)[at:]
            elif kind == 4:
                content[:8] = dice.choice([dice.randrange(1 << 17), dice.randrange(1 << 64)]).to_bytes(8, "little")
            else:
                content[at : at + 4] = dice.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"9999", b'"":['])
        return bytes(content)


def send_mutations(url: str, count: int, seed: int) -> Counter[int]:
    """Have so many files checked, and stored nowhere; every answer is whole and below 500."""
    mutate, statuses = Mutator(seed), Counter[int]()
    with httpx.Client(base_url=url, timeout=60) as http:
        for _ in range(count):
            content = mutate()
            answer = http.put("/v1/prompts/mutant", params={"dry_run": True}, content=content)
            assert answer.status_code < 500, (content[:400], answer.text)
            statuses[answer.status_code] += 1
            if answer.status_code != 200:
                assert answer.json()["error"]["code"]
    return statuses


def test_mutations(server: LiveServer) -> None:
    """100 of them."""
    assert send_mutations(server.url, 100, 1)[422] > 60


@pytest.mark.long
def test_a_hundred_thousand_mutations(forge: ReplicaForge, tmp_path: Path) -> None:
    """A process of its own, with its time and memory."""
    caches = {"kv_cache_bytes": 8 << 20, "prompt_cache_bytes": 1 << 20}  # full soon: what grows then is a leak
    replica = Replica(forge, tmp_path, str(tmp_path / "store"), **caches)
    try:
        replica.start().until_ready()
        send_mutations(replica.url, 500, 2)
        process = psutil.Process(replica.pid)
        before, began = process.memory_info().rss, sum(process.cpu_times()[:2])
        statuses = send_mutations(replica.url, 100_000, 3)
        cpu = (sum(process.cpu_times()[:2]) - began) / 100_000
        grown = process.memory_info().rss - before
        ask = {"model": MODEL, "prompt": "the quick", "max_tokens": 2}
        assert httpx.post(f"{replica.url}/v1/completions", json=ask, timeout=60).status_code == 200
    finally:
        replica.close()
    mutate, slowest = Mutator(3), 0.0
    spec = frozen(forge.model).spec
    for _ in range(100_000):
        content = mutate()
        began = time.thread_time()
        try:
            decode(content, spec)
        except ArtifactError:
            slowest = max(slowest, time.thread_time() - began)
    print(json.dumps({
        "statuses": statuses, "cpu_ms_each": round(1e3 * cpu, 2), "rss_grew_mb": round(grown / 1e6, 1),
        "slowest_decode_cpu_ms": round(1e3 * slowest, 1),
    }))  # fmt: skip
    assert slowest <= 0.02 and grown <= 64e6
