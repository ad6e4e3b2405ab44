"""From rows to prompts of T5 and BART over HTTP: many jobs in one call, and what they publish answers as PEFT does."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from promptd_store import decode
from transformers import AutoModelForSeq2SeqLM

from promptd.settings import Settings
from tests.api.conftest import LiveServer, serve
from tests.engine.harness import frozen
from tests.engine.seq2seq_oracle import Row, library
from tests.engine.test_seq2seq import start_of
from tests.engine.test_seq2seq_peft import answer
from tests.peft_adapters import WARNS
from tests.training.site import ROWS

pytestmark = WARNS
TEXT = "is there rain 3"
JOBS: dict[str, dict[str, Any]] = {
    "intents": {"type": "residual", "residual": {"hyperparameters": {"num_virtual_tokens": 5}}},
    "everywhere": {"type": "prefix_tuning", "prefix_tuning": {"hyperparameters": {"num_virtual_tokens": 3}}},
    "decoder": {
        "type": "p_tuning_v2",
        "p_tuning_v2": {"hyperparameters": {"num_virtual_tokens": 4, "banks": "decoder"}},
    },
}


@pytest.fixture(scope="module", params=["t5", "bart"])
def live(
    tiny_seq2seq: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[LiveServer]:
    """A server that trains in its spare time."""
    folder = tiny_seq2seq[request.param]
    settings = Settings(model=str(folder), store=str(tmp_path_factory.mktemp("learned")), drain_seconds=1)
    with serve(settings, folder) as live:
        yield live


def test_upload_train_ask(live: LiveServer, tmp_path: Path) -> None:
    """Three methods at once: each loses less than the bare model; what was learned answers as transformers does under
    the same tensors, and as PEFT does under its own files. A text without questions to distill, and a start that would
    lose its decoder's part, are refused."""
    jobs = []
    for name, method in JOBS.items():
        own = method[method["type"]]["hyperparameters"]
        settings = {**own, "num_steps": 16, "batch_size": 8, "num_evaluations": 4}
        rows: list[dict[str, Any]] = [dict(row) for row in ROWS]
        if name == "everywhere":
            rows = [{"prompt": row["text"], "completion": f" {row['label']}"} for row in ROWS]
        method = {"type": method["type"], method["type"]: {"hyperparameters": settings}}
        jobs.append({"name": name, "rows": rows, "method": method, "publish_worse": True, "seed": 1})
    jobs.append({"name": "told", "distill": {"text": "the lazy dog"}})
    with live.http() as http:
        both = library(live.folder)[9]
        assert http.put("/v1/prompts/both", content=both.content).status_code == 201
        started = {"name": "again", "base_prompt": "both", "rows": ROWS}
        (lost,) = http.post("/admin/training/jobs", json={"jobs": [started]}).json()["data"]
        assert (lost["status"], lost["error"]["param"]) == (400, "base_prompt")
        created = http.post("/admin/training/jobs", json={"jobs": jobs})
        assert created.status_code == 207, created.text
        ended = [live.ended(one["job"]["id"]) for one in created.json()["data"]]
        assert [job["status"] for job in ended] == ["succeeded"] * 3 + ["failed"], [job["error"] for job in ended]
        assert ended[-1]["error"]["param"] == "training_file"
        for job in ended[:3]:
            assert job["result"]["scores_after"]["loss"] < job["result"]["scores_before"]["loss"]
        asked = {"prompt": TEXT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        ids = frozen(live.folder).encode(TEXT)
        for name in JOBS:
            reply = http.post("/v1/completions", json={"model": name, **asked}).json()["choices"][0]["token_ids"]
            artifact = decode(http.get(f"/v1/prompts/{name}/content").content, frozen(live.folder).spec)
            assert reply == Row(live.folder, (artifact,), ids).greedy(start_of(live.folder), 6)[0], name
            if name == "everywhere":
                continue
            exported = http.get(f"/v1/prompts/{name}/content", params={"format": "peft"})
            if name == "decoder" and frozen(live.folder).spec.num_layers % 2 == 0:
                assert exported.status_code == 422  # PEFT reads two layers from one slot there
                continue
            zipfile.ZipFile(io.BytesIO(exported.content)).extractall(tmp_path / name)
            base = AutoModelForSeq2SeqLM.from_pretrained(live.folder)
            tuned = PeftModel.from_pretrained(base, tmp_path / name).eval()
            assert answer(tuned, tuple(ids), start_of(live.folder)[0])[:6] == tuple(reply), name
