"""`promptd convert` on real files of other programs."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from promptd.commands.old_formats import ConversionError, read_old
from tests.clients.test_cli import run

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


# 1.5 kB that declare 16 TiB.
with torch.sparse.check_sparse_tensor_invariants():
    SPARSE = torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (4, 1 << 40))


class Attack:
    """A pickle that would run code where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def _pickled(adapters: Path, kind: str, root: Path) -> Path:
    """Write a PEFT folder as PEFT did before safetensors."""
    folder = root / kind
    folder.mkdir(parents=True)
    shutil.copy(adapters / kind / CONFIG, folder)
    torch.save(load_file(adapters / kind / WEIGHTS), folder / "adapter_model.bin")
    return folder


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_peft_pickles_become_what_peft_writes_today(adapters: Path, tmp_path: Path, kind: str) -> None:
    """adapter_model.bin becomes byte for byte the safetensors file that PEFT itself saved."""
    _pickled(adapters, kind, tmp_path / "old")
    result = run("convert", str(tmp_path / "old"), "-o", str(tmp_path / "new"))
    assert result.exit_code == 0, result.output
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "new" / kind / file).read_bytes() == (adapters / kind / file).read_bytes()


def test_tgis_prompts_become_peft_folders(adapters: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """A TGIS decoder.pt becomes a folder that PEFT itself loads, numbers bit for bit."""
    tensor = load_file(adapters / "soft" / WEIGHTS)["prompt_embeddings"]
    (tmp_path / "task").mkdir()
    torch.save(tensor, tmp_path / "task" / "decoder.pt")
    assert run("convert", str(tmp_path / "task"), "-o", str(tmp_path / "new")).exit_code == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses names that transformers will drop
        tuned = PeftModel.from_pretrained(base, str(tmp_path / "new" / "task"))
    assert torch.equal(tuned.prompt_encoder["default"].embedding.weight, tensor)


def test_converted_prompts_pass_the_checks(adapters: Path, tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """What convert writes is what push takes: the two fit together on every format."""
    tensor = load_file(adapters / "soft" / WEIGHTS)["prompt_embeddings"]
    old = tmp_path / "old"
    _pickled(adapters, "prefix", old)
    (old / "tgis").mkdir()
    torch.save(tensor, old / "tgis" / "decoder.pt")
    torch.save({"base_model.prompt_embeddings": tensor.to(torch.bfloat16)}, old / "state.pt")
    np.save(old / "lester.npy", tensor.numpy().astype(np.float64))
    np.save(old / "big-endian.npy", tensor.numpy().astype(">f4"))
    converted = run("convert", str(old), "-o", str(tmp_path / "new"))
    assert converted.exit_code == 0, converted.output
    assert "float64 was rounded" in converted.stderr
    checked = run("prompts", "push", str(tmp_path / "new"), "--dry-run", "--model", str(tiny_models["llama"]), "--json")
    lines = {line["name"]: line for line in map(json.loads, checked.stdout.splitlines())}
    assert checked.exit_code == 0 and set(lines) == {"prefix", "tgis", "state", "lester", "big-endian"}
    assert torch.equal(load_file(tmp_path / "new" / "big-endian" / WEIGHTS)["prompt_embeddings"], tensor)


def test_encoder_decoder_prompts_are_put_together(tmp_path: Path) -> None:
    """encoder.pt and decoder.pt become PEFT's one tensor: the encoder's rows first; unequal ones are refused."""
    torch.save(torch.full((3, 8), 1.0), tmp_path / "encoder.pt")
    torch.save(torch.full((3, 8), 2.0), tmp_path / "decoder.pt")
    prompt = read_old(tmp_path)
    config = json.loads(prompt.config)
    assert prompt.tensor[:, 0].tolist() == [1.0] * 3 + [2.0] * 3
    assert (config["num_virtual_tokens"], config["num_transformer_submodules"]) == (3, 2)
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    torch.save(torch.zeros(4, 8), tmp_path / "decoder.pt")
    with pytest.raises(ConversionError, match="equally many rows"):
        read_old(tmp_path)


def test_residual_prompts_are_warned_about(tmp_path: Path) -> None:
    """prompt.npy of ResidualPrompts is converted, with the warning that it is the prompt before its MLP."""
    np.save(tmp_path / "prompt.npy", np.ones((4, 8), np.float32))
    result = run("convert", str(tmp_path / "prompt.npy"), "-o", str(tmp_path / "new"))
    assert result.exit_code == 0 and "BEFORE its residual MLP" in result.stderr
    assert (tmp_path / "new" / tmp_path.name / WEIGHTS).exists()


def test_nothing_in_a_pickle_runs(tmp_path: Path) -> None:
    """Code in .pt, .bin and .npy files is refused and never run; the control is that pickle itself runs it."""
    trace = tmp_path / "it-ran"
    attack = pickle.dumps(Attack(trace))
    (tmp_path / "a.pt").write_bytes(attack)
    torch.save(Attack(trace), tmp_path / "b.bin")
    np.save(tmp_path / "c.npy", np.array([Attack(trace)], dtype=object), allow_pickle=True)
    result = run("convert", *(str(tmp_path / name) for name in ("a.pt", "b.bin", "c.npy")), "-o", str(tmp_path / "new"))
    assert result.exit_code == 1 and result.output.count("FAIL") == 3
    assert not trace.exists()
    pickle.loads(attack)  # noqa: S301 - our own bytes
    assert trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("sparse.pt", SPARSE, "sparse"),
        ("vector.pt", torch.zeros(4), "shape"),
        ("ids.pt", torch.zeros(4, 8, dtype=torch.int64), "shape"),
        ("two.pt", {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, "expected one tensor"),
        ("text.pt", "hello", "not tensors"),
        ("nan.pt", torch.full((2, 4), torch.nan), "not finite"),
    ],
)
def test_what_is_not_a_prompt_is_refused(tmp_path: Path, name: str, content: object, reason: str) -> None:
    """Each thing that is no prompt is refused with its own reason."""
    torch.save(content, tmp_path / name)
    with pytest.raises(ConversionError, match=reason):
        read_old(tmp_path / name)


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    """LoRA is said to be no prompt; a folder that has safetensors already needs nothing."""
    torch.save({"x": torch.zeros(1, 1)}, tmp_path / "adapter_model.bin")
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ConversionError, match="'LORA' is not a learned prompt"):
        read_old(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(ConversionError, match="already"):
        read_old(tmp_path)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    """An existing folder is kept unless --force is given."""
    np.save(tmp_path / "one.npy", np.ones((4, 8), np.float32))
    arguments = ["convert", str(tmp_path / "one.npy"), "-o", str(tmp_path / "new")]
    assert run(*arguments).exit_code == 0
    assert run(*arguments).exit_code == 1
    assert run(*arguments, "--force").exit_code == 0
