"""`promptd prompts push`: many folders, resumed runs, dry runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from promptd_client import Client
from safetensors.torch import load_file, save_file

from promptd.commands.push_state import PushState
from promptd.commands.sources import find_sources
from tests.clients.conftest import Live
from tests.clients.test_cli import run

NUM_FOLDERS = 200


def _lines(*arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    result = run("prompts", "push", *arguments, "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return result.exit_code, {line["name"]: line for line in lines}


def _many(adapters: Path, root: Path, count: int) -> Path:
    """Make folders whose prompts all differ, nested two deep."""
    for number in range(count):
        kind = ("soft", "prefix")[number % 2]
        folder = root / f"team-{number % 3}" / f"user-{number:03}"
        shutil.copytree(adapters / kind, folder)
        tensor = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        torch.manual_seed(number)
        save_file(
            {"prompt_embeddings": tensor + 0.01 * torch.randn_like(tensor)},
            folder / "adapter_model.safetensors",
            {"format": "pt"},
        )
    return root


def _break(root: Path) -> dict[str, str]:
    """Break five folders; return name -> the code that each must be refused with."""
    folders = {path.name: path for path in root.glob("*/user-*")}
    weights = "adapter_model.safetensors"
    content = (folders["user-001"] / weights).read_bytes()
    (folders["user-001"] / weights).write_bytes(content[:-7])
    (folders["user-002"] / weights).unlink()
    (folders["user-003"] / "adapter_config.json").write_text("{")
    config = json.loads((folders["user-004"] / "adapter_config.json").read_text())
    (folders["user-004"] / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    save_file({"prompt_embeddings": torch.zeros(3, 5)}, folders["user-005"] / weights)
    return {
        "user-001": "truncated",
        "user-002": "not_readable",
        "user-003": "not_readable",
        "user-004": "peft_type_not_supported",
        "user-005": "shape_mismatch",
    }


@pytest.mark.parametrize("with_model", [False, True], ids=["structural", "with model"])
def test_dry_run(adapters: Path, tmp_path: Path, tiny_models: dict[str, Path], with_model: bool) -> None:
    """Hundreds of folders are checked without a server: one line each, every broken one by its typed error."""
    root = _many(adapters, tmp_path, NUM_FOLDERS)
    broken = _break(root)
    options = ["--model", str(tiny_models["llama"])] if with_model else []
    status, lines = _lines(str(root), "--dry-run", *options)
    assert status == 1 and len(lines) == NUM_FOLDERS
    failed = {name: line["error"].partition(":")[0] for name, line in lines.items() if line["status"] == "failed"}
    assert failed == broken
    assert (lines["user-010"]["kind"], lines["user-010"]["num_virtual_tokens"]) == ("soft", 7)
    assert (lines["user-011"]["kind"], lines["user-011"]["num_virtual_tokens"]) == ("prefix", 4)


def test_a_model_shows_what_the_structure_cannot(adapters: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Numbers that are not finite pass the structural checks, and fail beside a model: the control of both."""
    folder = tmp_path / "nan"
    shutil.copytree(adapters / "soft", folder)
    tensor = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    tensor[0, 0] = torch.nan
    save_file({"prompt_embeddings": tensor}, folder / "adapter_model.safetensors")
    assert _lines(str(folder), "--dry-run")[0] == 0
    status, lines = _lines(str(folder), "--dry-run", "--model", str(tiny_models["llama"]))
    assert status == 1 and lines["nan"]["error"].startswith("non_finite")


def test_push_goes_on_where_it_stopped(adapters: Path, tmp_path: Path, live: Live) -> None:
    """A second run skips what is there, sends what changed, and sends again what the server lost."""
    root = _many(adapters, tmp_path / "all", 12)
    broken = _break(root)
    options = ["--state", str(tmp_path / "state.jsonl"), "--jobs", "3", *live.options]
    status, lines = _lines(str(root), *options)
    assert status == 1
    assert {name for name, line in lines.items() if line["status"] == "failed"} == set(broken)
    assert sum(line["status"] == "pushed" for line in lines.values()) == 12 - len(broken)

    with Client(live.url, api_key=live.key) as client:
        client.prompts.delete("user-006")
        changed = next(root.glob("*/user-007"))
        shutil.copy(next(root.glob("*/user-009")) / "adapter_model.safetensors", changed)
        status, lines = _lines(str(root), *options)
        statuses = {name: line["status"] for name, line in lines.items() if name not in broken}
        expected = dict.fromkeys(("user-000", "user-008", "user-009", "user-010", "user-011"), "skipped")
        assert statuses == expected | {"user-006": "pushed", "user-007": "pushed"}
        assert client.prompts.get("user-007").number == 2
        status, lines = _lines(str(root), "--no-resume", *options)
        assert {line["status"] for name, line in lines.items() if name not in broken} == {"unchanged"}
        for name in statuses:
            client.prompts.delete(name)


def test_the_report_is_a_line_each(adapters: Path, tmp_path: Path, live: Live) -> None:
    """On the terminal: name, kind, tokens, bytes and what became of it; the summary goes to stderr."""
    (tmp_path / "all" / "twin").mkdir(parents=True)
    for folder in ("one", "twin/one"):
        shutil.copytree(adapters / "soft", tmp_path / "all" / folder)
    result = run("prompts", "push", str(tmp_path / "all"), "--state", str(tmp_path / "state"), *live.options)
    good, bad = sorted(result.stdout.splitlines(), key=lambda line: "FAIL" in line)
    assert good.split() == ["ok", "one", "soft", "7", "tokens", "1.5", "kB", "pushed", "v1"]
    assert "duplicate_name" in bad and result.exit_code == 1
    assert "1 failed, 1 pushed" in result.stderr
    with Client(live.url, api_key=live.key) as client:
        client.prompts.delete("one")


def test_a_single_file(adapters: Path, tmp_path: Path, live: Live) -> None:
    """A .safetensors file is pushed under its own name."""
    file = tmp_path / "lone.safetensors"
    shutil.copy(adapters / "soft" / "adapter_model.safetensors", file)
    status, lines = _lines(str(file), "--state", str(tmp_path / "state"), *live.options)
    assert status == 0 and lines["lone"]["kind"] == "soft"


def test_what_is_found(tmp_path: Path) -> None:
    """Checkpoints inside a PEFT folder and hidden folders are not prompts of their own; names come from folders."""
    for folder in ("b", "b/checkpoint-10", "a/deep/c", ".cache/d"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").write_text("{}")
    assert [source.name for source in find_sources([tmp_path])] == ["c", "b"]
    assert [source.name for source in find_sources([tmp_path / "b"], "other")] == ["other"]
    result = run("prompts", "push", str(tmp_path / "nowhere"), "--dry-run")
    assert result.exit_code == 1 and "nowhere" in result.stderr


def test_state_survives_a_torn_line(tmp_path: Path) -> None:
    """A run that was killed while it wrote leaves a state that the next one can read."""
    path = tmp_path / "state"
    PushState(path, "http://a", reads_earlier=True).add("p", "digest", "sha256:1")
    with path.open("a") as file:
        file.write('{"url": "http://a", "na')
    state = PushState(path, "http://a", reads_earlier=True)
    assert state.is_done("p", "digest", {"p": "sha256:1"})
    assert not state.is_done("p", "digest", {"p": "sha256:2"})
    assert not state.is_done("p", "other", {"p": "sha256:1"})
    assert not PushState(path, "http://b", reads_earlier=True).is_done("p", "digest", {"p": "sha256:1"})
