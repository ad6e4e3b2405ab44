"""Clients that people already have, as they are: curl, npm's openai, LiteLLM, lm-evaluation-harness's command."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from promptd_client import Client
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.conftest import Live

HERE = Path(__file__).parent
GREEDY = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
TEXT = "the quick brown"
WORDS = (" fox", " dog")


@pytest.fixture(scope="module")
def client(live: Live, adapters: Path) -> Iterator[Client]:
    """Our own client, which says what the others should see; the server has the PEFT prompt `soft`."""
    with live.client() as client:
        client.prompts.upload_peft("soft", adapters / "soft")
        yield client


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which npm's `openai` is installed."""
    if shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text("{}")
    command = ["npm", "install", "--prefer-offline", "--no-audit", "--no-fund", "openai@^7"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"npm cannot install openai: {installed.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture(scope="module")
def litellm_python() -> str:
    """A Python that has LiteLLM: this one, or that of a virtual environment that PROMPTD_LITELLM_PYTHON names."""
    python = os.environ.get("PROMPTD_LITELLM_PYTHON")
    if python is None and importlib.util.find_spec("litellm") is None:
        pytest.skip("LiteLLM is not installed; PROMPTD_LITELLM_PYTHON may name a Python that has it")
    return python or sys.executable


def run(command: list[str], **environment: str) -> str:
    """Run a program to its good end and return what it printed."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def curl(live: Live, path: str, *options: str) -> str:
    """`curl` with the key; fails where the server answers with an error."""
    common = ["curl", "-sS", "--fail-with-body", "-H", f"Authorization: Bearer {live.key}"]
    return run([*common, *options, live.url + path])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(live: Live, client: Client, adapters: Path, tmp_path: Path) -> None:
    """curl uploads a file as the body, asks, streams, and sends rows as a form, without any trick."""
    weights = adapters / "soft" / "adapter_model.safetensors"
    record = json.loads(curl(live, "/v1/prompts/by-curl", "--upload-file", str(weights)))
    assert record["version"] == client.prompts.get("soft").version

    asked = {"model": "by-curl", "prompt": TEXT, **GREEDY}
    expected = client.complete(TEXT, model="soft", **GREEDY)
    body = ["-H", "Content-Type: application/json", "-d"]
    answer = json.loads(curl(live, "/v1/completions", *body, json.dumps(asked)))
    assert answer["choices"][0]["text"] == expected.text

    events = curl(live, "/v1/completions", "-N", *body, json.dumps({**asked, "stream": True})).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
    assert len(pieces) > 1 and "".join(pieces) == expected.text

    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n')
    form = ["-F", "purpose=fine-tune", "-F", f"file=@{tmp_path / 'rows.jsonl'}"]
    assert json.loads(curl(live, "/v1/files", *form))["filename"] == "rows.jsonl"

    assert curl(live, "/v1/prompts/by-curl/content", "-o", str(tmp_path / "back")) == ""
    assert (tmp_path / "back").read_bytes() == weights.read_bytes()
    assert json.loads(curl(live, "/v1/prompts/by-curl", "-X", "DELETE"))["deleted"] is True


@pytest.mark.long
def test_npm_openai(live: Live, client: Client, node_modules: Path, tmp_path: Path) -> None:
    """OpenAI's package for JavaScript asks, streams, breaks off, gets its typed errors, and trains."""
    shutil.copy(HERE / "openai_sdk.mjs", node_modules)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the {n}", "label": "ab"[n % 2]}) + "\n" for n in range(8)))
    command = ["node", str(node_modules / "openai_sdk.mjs"), f"{live.url}/v1", live.key, str(rows)]
    seen = json.loads(run(command))

    expected = client.complete(TEXT, model="soft", **GREEDY)
    assert {"tiny", "soft"} <= set(seen["models"])
    assert seen["text"] == seen["streamed"] == expected.text
    assert seen["versions"] == expected.prompt_versions
    assert (seen["virtual"], seen["logprobs"], seen["usage"]) == (7, 8, 8)
    assert seen["bare"] == client.complete(TEXT, **GREEDY).text != expected.text
    assert seen["labels"] == [2, 2]
    assert seen["errors"] == [
        ["NotFoundError", 404, "model"],
        ["BadRequestError", 400, "temperature"],
        ["BadRequestError", 400, "unheard"],
        ["AuthenticationError", 401, None],
    ]
    assert seen["job"] == ["succeeded", "by-node"]
    assert len(seen["events"]) >= 3 and seen["learned"] == 1


@pytest.mark.long
def test_litellm(live: Live, client: Client, litellm_python: str) -> None:
    """LiteLLM's library and router complete and stream under a prompt, and raise their own errors."""
    clean = dict.fromkeys(("PYTHONPATH", "PYTHONWARNINGS"), "")
    printed = run([litellm_python, str(HERE / "litellm_calls.py"), f"{live.url}/v1", live.key], **clean)
    seen = json.loads(printed.splitlines()[-1])
    expected = client.complete(TEXT, model="soft", **GREEDY)
    assert seen["text"] == seen["streamed"] == seen["routed"] == expected.text
    assert seen["usage"] == 8
    assert seen["bare"] == client.complete(TEXT, **GREEDY).text != expected.text
    assert seen["errors"] == [["NotFoundError", 404], ["BadRequestError", 400]]


@pytest.mark.long
def test_lm_eval_command(
    live: Live, client: Client, adapters: Path, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """The `lm_eval` command runs a multiple-choice, a rolling and a generating task on a prompt, in batches of 32."""
    texts = [f"{word} {number}" for word in ("the", "a", "some", "over") for number in range(10)]
    oracle = Oracle(tiny_models["llama"], adapters / "soft")
    rows = [{"text": text, "answer": oracle.choice(text), "said": _said(client, text)} for text in texts]
    assert {row["answer"] for row in rows} == {0, 1}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
    }
    tasks: dict[str, dict[str, Any]] = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": [word.strip() for word in WORDS],
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        },
        "say": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "said",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "roll": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    (tmp_path / "tasks").mkdir()
    for name, task in tasks.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))
    arguments = f"model=soft,base_url={live.url}/v1/completions,tokenizer={tiny_models['llama']},num_concurrent=2"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "choose,say,roll", "--include_path", str(tmp_path / "tasks"), "--batch_size", "32"]
    command += ["--output_path", str(tmp_path / "out")]
    run(command, OPENAI_API_KEY=live.key, HF_DATASETS_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    (report,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(report.read_text())["results"]
    assert results["choose"]["acc,none"] == 1.0
    assert results["say"]["exact_match,none"] == 1.0
    assert results["roll"]["word_perplexity,none"] == pytest.approx(oracle.word_perplexity(texts), rel=1e-3)


class Oracle:
    """PEFT's own log-probabilities under the prompt, one text at a time."""

    def __init__(self, base: Path, adapter: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT uses names that transformers will drop
            self._model = PeftModel.from_pretrained(model, str(adapter)).eval()

    def choice(self, text: str) -> int:
        """Return the number of the likelier word."""
        context = self._ids(text)
        scores = [self._score(self._ids(text + word), len(context)) for word in WORDS]
        return int(scores[1] > scores[0])

    def word_perplexity(self, texts: list[str]) -> float:
        """Each text behind one token that says nothing, as the harness has it."""
        start = self._tokenizer.bos_token_id
        start = self._tokenizer.eos_token_id if start is None else start
        total = sum(self._score([start, *self._ids(text)], 1) for text in texts)
        return math.exp(-total / sum(len(text.split()) for text in texts))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def _score(self, ids: list[int], start: int) -> float:
        logits = self._model(input_ids=torch.tensor([ids])).logits[0, -len(ids) : -1]
        scores = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        return float(scores[start - 1 :].sum())


def _said(client: Client, text: str) -> str:
    return client.complete(text, model="soft", max_tokens=8, temperature=0.0, stop=["\n\n"]).text
