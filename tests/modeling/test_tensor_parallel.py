"""A decoder divided over two processes gives the answers of the whole one, and ends whole."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from promptd_store import PromptArtifact

from promptd.errors import ModelRefusedError
from promptd.modeling.families.base import Sizes
from promptd.modeling.packed_batch import PackedRow, Virtual
from promptd.modeling.ranks import Rank
from promptd.modeling.tensor_parallel import Order, ParallelModel, order_of, rows_of
from promptd.settings import Settings
from tests.engine.harness import library
from tests.ports import free_port

START_SECONDS = 180
TEXTS = ("the quick brown fox", "a", "one two three four five six seven eight")


def test_orders_arrive_as_they_were_said(tmp_path: Path) -> None:
    """Rows and tensors of every dtype, through a file; the end of the file is the end of the orders."""
    embeds = torch.randn(2, 8, dtype=torch.bfloat16)
    rows = [
        PackedRow([1, 2, 3], 4, range(7, 10), [(0, 5), (9, 1)], range(3)),
        PackedRow([0, 0], 0, [3, 4], (), (), (Virtual(0, embeds),)),
        PackedRow((5,), 9, (2,), ()),
    ]
    with (tmp_path / "orders").open("wb") as stream:
        order_of(rows).write(stream)
        Order("prefix", {"spans": [(0, 3)]}, [torch.arange(6.0).reshape(1, 2, 3), torch.empty(0, 4)]).write(stream)
        stream.write(b'{"what": "cut o')
    with (tmp_path / "orders").open("rb") as stream:
        first, second = Order.read(stream), Order.read(stream)
        assert Order.read(stream) is None
    assert first is not None and second is not None
    heard = rows_of(first)
    assert torch.equal(heard[1].virtual[0].embeds, embeds)
    for found, wanted in zip(heard, rows, strict=True):
        for name in ("token_ids", "slots", "context", "logits"):
            assert list(getattr(found, name)) == list(getattr(wanted, name)), name
        assert found.first_position == wanted.first_position and len(found.virtual) == len(wanted.virtual)
    assert [tensor.shape for tensor in second.tensors] == [(1, 2, 3), (0, 4)]
    assert torch.equal(second.tensors[0].flatten(), torch.arange(6.0))


def test_what_cannot_be_divided_is_refused() -> None:
    """Heads that do not come out even, and training or strict tiles over parts of a model."""
    sizes = Sizes(num_layers=2, hidden_size=48, num_attention_heads=6, num_kv_heads=2, head_dim=8, max_positions=64)
    assert Rank(1, 2).part_of(sizes).num_kv_heads == 1 and Rank(1, 2).part_of(sizes).num_attention_heads == 3
    with pytest.raises(ModelRefusedError, match="tensor_parallel 3: 2 num_kv_heads are not divisible"):
        Rank(0, 3).part_of(sizes)
    for settings in ({}, {"training": "off", "strict": True}, {"training": "off", "quantization": "int8"}):
        with pytest.raises(ValueError, match="--tensor-parallel"):
            Settings(tensor_parallel=2, **settings)
    assert Settings(tensor_parallel=2, training="off").tensor_parallel == 2


@contextlib.contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`promptd serve` as a process of its own, ready; and its address."""
    port = free_port()
    words = ["--model", model, "--port", str(port), "--store", folder / "store", "--training", "off", *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "promptd.cli", "serve", *map(str, words)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                    break
            time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait(20)


def answers(url: str, prompts: tuple[PromptArtifact, ...]) -> list[object]:
    """What a server says under prompts of every kind, one after another and many at once."""
    found: list[object] = []
    with httpx.Client(base_url=url, timeout=60) as http:
        for number, artifact in enumerate(prompts):
            assert http.put(f"/v1/prompts/p{number}", content=artifact.content).is_success
        http.put("/v1/prompts/text", json={"text": "once upon a time"}).raise_for_status()
        names = [None, *([f"p{number}"] for number in range(len(prompts))), ["text"], ["p0", "p1"]]
        for name in names:
            body = {"prompt": list(TEXTS), "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1}
            reply = http.post("/v1/completions", json={**body, "prompt_ids": name, "return_token_ids": True})
            assert reply.status_code == 200, reply.text
            found.append([choice["token_ids"] for choice in reply.json()["choices"]])
        version = http.get("/v1/prompts/p0").json()["version"]
        engine = http.get("/admin/engine").json()
        found += [version, engine["fingerprint"]]
    return found


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_two_processes_answer_as_one(family: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Token for token, with soft prompts, prefixes, texts and chains; SIGTERM ends all of it."""
    prompts = library(tiny_models[family])[:6]
    found = []
    for options in ((), ("--tensor-parallel", "2")):
        folder = tmp_path / f"{len(options)}"
        folder.mkdir()
        with serving(tiny_models[family], folder, *options) as (process, url):
            children = psutil.Process(process.pid).children(recursive=True)
            assert len(children) == len(options) // 2, (folder / "log").read_text()
            found.append(answers(url, prompts))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, (folder / "log").read_text()
            psutil.wait_procs(children, timeout=20)
            assert not any(child.is_running() for child in children)
    assert found[0] == found[1]
    assert len({json.dumps(one) for one in found[0]}) > len(prompts)  # the control: prompts do change the answers


@pytest.mark.long
def test_a_lost_part_ends_the_server(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A server without a part of its model does not go on: it ends, with a reason, and its balancer sees it gone."""
    with serving(tiny_models["llama"], tmp_path, "--tensor-parallel", "2") as (process, url):
        assert httpx.get(f"{url}/readyz").status_code == 200
        (child,) = psutil.Process(process.pid).children(recursive=True)
        child.kill()
        assert process.wait(60) == 1
    assert "has ended with status -9" in (tmp_path / "log").read_text()


@pytest.mark.long
def test_a_model_without_a_plan_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """One clear line, status 1."""
    with serving(tiny_models["gpt2"], tmp_path, "--tensor-parallel", "2") as (process, _):
        assert process.wait(START_SECONDS) == 1
    log = (tmp_path / "log").read_text()
    assert "transformers has no plan for gpt2" in log and "Traceback" not in log


def test_a_leader_replays_no_graph() -> None:
    """Of a step that only the leader replays the others would hear nothing: no device is asked."""
    assert ParallelModel.steps_over(None, None) is None  # type: ignore[arg-type, func-returns-value]
