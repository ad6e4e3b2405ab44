"""Large bodies wait on the disk: they are never whole in memory, nobody finds them there, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from promptd_store import EmbeddedStore, decode, encode
from starlette.requests import ClientDisconnect
from transformers import LlamaConfig, LlamaForCausalLM

from promptd.api import uploads
from promptd.errors import InvalidRequestError, OverloadedError, PayloadTooLargeError
from promptd.jobs.files import check_lines
from tests.api.conftest import LiveServer
from tests.api.training_server import TrainingServer
from tests.engine.harness import frozen
from tests.family_models import write_model
from tests.patience import until
from tests.replicas import Replica, ReplicaForge
from tests.tiny_models import VOCAB_SIZE, make_tokenizer

MIB = 1 << 20
NUM_PIECES = 24


class Body:
    """A request of which only the body is asked for: so many MiB, or what comes of it before the client leaves."""

    def __init__(self, num_pieces: int = NUM_PIECES, *, leaves: bool = False) -> None:
        self.headers: dict[str, str] = {}
        self._num_pieces = num_pieces
        self._leaves = leaves

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield it, each byte another than its neighbours."""
        for number in range(self._num_pieces):
            yield bytes([number]) * MIB
        if self._leaves:
            raise ClientDisconnect


def read(folder: Path | None, body: Body, monkeypatch: pytest.MonkeyPatch, limit: int = 64 * MIB) -> bytes | memoryview:
    """Read a body as a server with such a folder does."""
    monkeypatch.setattr(uploads, "largest_upload", lambda services, request: limit)
    services: Any = SimpleNamespace(limits=SimpleNamespace(spool_folder=folder))
    request: Any = body
    return asyncio.run(uploads.read_upload(services, request))


def nameless(folder: Path, pid: int | str = "self") -> list[int]:
    """Sizes of the files of a folder that a process has open and that have no name."""
    found = []
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(one.readlink())
            if target.startswith(str(folder)) and target.endswith("(deleted)"):
                found.append(one.stat().st_size)
    return found


def test_a_large_body_is_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 MiB cost some pieces' worth, and no name; in memory (the control) they cost all of it, and are the same."""
    peaks, wanted = [], b"".join(bytes([number]) * MIB for number in range(NUM_PIECES))
    for limit, files in ((MIB, [len(wanted)]), (1 << 30, [])):
        monkeypatch.setattr("promptd.api.spool.MAX_IN_MEMORY", limit)
        tracemalloc.start()
        content = read(tmp_path, Body(), monkeypatch)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert bytes(content) == wanted and isinstance(content, memoryview) == bool(files)
        assert not list(tmp_path.iterdir()) and nameless(tmp_path) == files
        del content
        assert nameless(tmp_path) == []
    assert peaks[0] < 5 * MIB < NUM_PIECES * MIB < peaks[1]


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that is too long, of one whose client leaves, and where the disk takes no more: that is 503."""
    with pytest.raises(PayloadTooLargeError):
        read(tmp_path, Body(), monkeypatch, limit=NUM_PIECES * MIB - 1)
    with pytest.raises(ClientDisconnect):
        read(tmp_path, Body(leaves=True), monkeypatch)
    with pytest.raises(OverloadedError, match="No such file") as refused:
        read(tmp_path / "absent", Body(), monkeypatch)
    assert refused.value.code == "no_room"
    assert isinstance(read(tmp_path / "absent", Body(1), monkeypatch), bytes)  # it never gets there
    assert not list(tmp_path.iterdir()) and nameless(tmp_path) == []


def test_a_prompt_is_decoded_where_it_lies(server: LiveServer, tmp_path: Path) -> None:
    """The same version and numbers as from memory, without a copy where the bytes may be used; and it can be stored."""
    spec = server.model.spec
    content = bytes(
        encode("prefix", 0.1 * torch.randn(spec.num_layers, 2, spec.num_kv_heads, 16, spec.head_dim)).content
    )
    size = int.from_bytes(content[:8], "little")
    odd = (size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :]
    wanted = decode(content, spec)
    for file, is_mapped in ((content, True), (odd, False)):  # numbers beside their own boundaries are copied
        view = memoryview(bytearray(file))
        artifact = decode(view, spec)
        assert artifact.version == wanted.version and torch.equal(artifact.learned, wanted.learned)
        begin = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
        assert (begin <= artifact.learned.data_ptr() < begin + len(file)) == is_mapped

    async def stored() -> bytes:
        store = EmbeddedStore(tmp_path)
        try:
            first = await store.put_blob("acme", memoryview(bytearray(content)))
            assert await store.put_blob("acme", content) == first  # found to be the same
            return await store.get_blob("acme", first)
        finally:
            await store.close()

    assert asyncio.run(stored()) == content


def test_training_files_wait_there_too(
    trainer: TrainingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the server's folder, not in the system's: a folder that is not there makes 503 of large files alone."""
    services = trainer.live.app.state.services
    monkeypatch.setattr("promptd.api.spool.MAX_IN_MEMORY", 1 << 16)
    large, small = b'{"text": "x", "label": "y"}\n' * 4000, b'{"text": "x", "label": "y"}\n'
    with trainer.http("eve") as http:

        def upload(content: bytes, folder: Path) -> httpx.Response:
            monkeypatch.setattr(services, "limits", replace(services.limits, spool_folder=folder))
            return http.post("/v1/files", files={"file": ("a", content)}, data={"purpose": "fine-tune"})

        refused = upload(large, tmp_path / "absent")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_room")
        assert "retry-after" in refused.headers
        for content, folder in ((small, tmp_path / "absent"), (large, tmp_path)):
            file = upload(content, folder).raise_for_status().json()
            assert http.get(f"/v1/files/{file['id']}/content").content == content
            assert http.delete(f"/v1/files/{file['id']}").status_code == 200
    assert not list(tmp_path.iterdir())


def test_lines_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A character and a line that two pieces share are whole; faults are named as if the file were read at once."""
    text = '{"a": "é€😀"}\n'.encode() * 40
    for size in (1, 2, 3, 7, 16, 1000):
        monkeypatch.setattr("promptd.jobs.files.PIECE_BYTES", size)
        monkeypatch.setattr("promptd.jobs.files.MAX_LINE_BYTES", 30)
        check_lines(memoryview(text), "file")
        for bad in (text[:-4] + b"\xff\n", text[:-5]):
            with pytest.raises(UnicodeDecodeError) as wanted:
                bad.decode()
            with pytest.raises(InvalidRequestError) as refused:
                check_lines(bad, "file")
            place = f"({wanted.value.reason} at byte {wanted.value.start})"
            assert str(refused.value) == f"line 40: not UTF-8 {place}"
        with pytest.raises(InvalidRequestError, match="line 41: has 31 bytes, at most 30 are allowed"):
            check_lines(text + b"x" * 31 + b"\n" + b"y" * 40, "file")
        with pytest.raises(InvalidRequestError, match="no rows at all"):
            check_lines(b"\n  \n" * 50, "file")


def memory(pid: int) -> int:
    """A process's own memory now, in bytes: without what is mapped from files."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


class Peak:
    """The most memory that a process had during a block, beyond what it had before."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self.num_bytes = 0

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.num_bytes = max(self.num_bytes, memory(self._pid) - self._before)

    def __enter__(self) -> Peak:
        self._before = memory(self._pid)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Replica]:
    """A server of its own whose prompts are large: 32 KiB for a virtual token."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=512, intermediate_size=64, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2100, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    forge = ReplicaForge(write_model(lambda: LlamaForCausalLM(config), make_tokenizer(), tmp_path / "wide"))
    caches = {"kv_cache_bytes": 128 << 20, "prompt_cache_bytes": 70 << 20, "artifact_cache_bytes": 0}
    replica = Replica(forge, tmp_path, str(tmp_path / "store"), training="worker", **caches)
    try:
        yield replica.start().until_ready()
    finally:
        replica.close()
        forge.close()


@pytest.mark.long
def test_memory_of_a_server(wide: Replica, tmp_path: Path) -> None:
    """A prefix of 64 MiB and as large a training file: what the server's memory grows by, and what is left of one
    whose client goes away."""
    assert wide.pid is not None
    model = frozen(tmp_path / "wide")
    spec = model.spec
    shape = (spec.num_layers, 2, spec.num_kv_heads, 2040, spec.head_dim)
    files = [bytes(encode("prefix", 0.1 * torch.randn(shape)).content) for _ in range(2)]
    size = len(files[0])
    told: dict[str, float] = {"body_mib": size / MIB}
    with httpx.Client(base_url=wide.url, timeout=300) as http:
        assert http.put("/v1/prompts/first", content=files[0]).status_code == 201  # the caches' pages are there now
        with socket.create_connection(("127.0.0.1", wide.port)) as leaving:
            head = f"PUT /v1/prompts/second HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
            with Peak(wide.pid) as peak:
                leaving.sendall(head.encode() + files[1][:-MIB])
                until(lambda: sum(nameless(tmp_path, wide.pid or 0)) >= size - 2 * MIB, "it is on the disk")
            told["waiting_mib"] = peak.num_bytes / MIB
            assert not list((tmp_path / "store").glob("*tmp*"))
        until(lambda: not nameless(tmp_path, wide.pid or 0), "the file has gone with its client")
        assert http.get("/v1/prompts/second").status_code == 404
        with Peak(wide.pid) as peak:
            assert http.put("/v1/prompts/second", content=files[1]).status_code == 201
        told["prompt_mib"] = peak.num_bytes / MIB
        assert not nameless(tmp_path, wide.pid)
        rows = b'{"text": "some words of a row", "label": "yes"}\n' * (60 * MIB // 48)
        with Peak(wide.pid) as peak:
            form: dict[str, Any] = {"files": {"file": ("rows.jsonl", rows)}, "data": {"purpose": "fine-tune"}}
            http.post("/v1/files", **form).raise_for_status()
        told["file_mib"] = peak.num_bytes / MIB
        assert not nameless(tmp_path, wide.pid)
    print(json.dumps({name: round(number, 1) for name, number in told.items()}))
    assert told["waiting_mib"] < size / MIB / 8
    assert told["file_mib"] < size / MIB / 2
    assert told["prompt_mib"] < size / MIB / 2
