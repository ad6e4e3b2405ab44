"""Identity of a base model: its weights and architecture, not its files."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from promptd.errors import ModelRefusedError
from promptd.modeling import load_model
from promptd.modeling.fingerprint import computing_settings, stored_tensors
from promptd.modeling.fingerprint import fingerprint as fingerprint_of
from tests.tiny_models import make_tiny_model, make_tokenizer


def fingerprint(folder: Path) -> str:
    """What a loaded model says it is."""
    return load_model(folder).spec.fingerprint


def copy(folder: Path, target: Path) -> Path:
    """A copy of a model that a test may change."""
    shutil.copytree(folder, target)
    return target


def write_backwards(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """A safetensors file of fp32 tensors in descending order of their names; the library writes ascending ones."""
    header, data = {}, b""
    for name in sorted(tensors, reverse=True):
        raw = tensors[name].contiguous().numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_shards_are_the_same_model(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """One file or many, in any order, beside whatever else lies in the folder: the same fingerprint."""
    folder = tiny_models["llama"]
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    name = type(AutoModelForCausalLM.from_pretrained(folder)).__name__
    assert fingerprint_of(name, {}, stored_tensors(shards)) == fingerprint_of(name, {}, stored_tensors(shards[::-1]))
    assert fingerprint(tmp_path) == fingerprint(folder)
    shutil.copy(folder / "model.safetensors", tmp_path / "consolidated.safetensors")  # the same weights once more
    assert fingerprint(tmp_path) == fingerprint(folder)


def test_the_order_inside_a_file_does_not_count(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Tensors written in another order are the same tensors."""
    tensors = load_file(tiny_models["gpt2"] / "model.safetensors")
    save_file(tensors, tmp_path / "a.safetensors")
    write_backwards(tensors, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "b.safetensors").read_bytes()
    digests = {fingerprint_of("x", {}, stored_tensors([tmp_path / f"{name}.safetensors"])) for name in "ab"}
    assert len(digests) == 1
    assert (
        fingerprint_of("y", {}, stored_tensors([tmp_path / "a.safetensors"])) not in digests
    )  # the architecture counts


def test_one_number_of_one_weight_changes_it(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """The smallest change of the weights is another model; the name of its folder is not."""
    folder = copy(tiny_models["gpt2"], tmp_path / "other-name")
    assert fingerprint(folder) == fingerprint(tiny_models["gpt2"])
    tensors = load_file(folder / "model.safetensors")
    name = max(tensors)
    flat = tensors[name].flatten()
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != fingerprint(tiny_models["gpt2"])


def test_other_sizes_are_another_model(tmp_path: Path) -> None:
    """Layers, width and vocabulary each change the stored tensors, and so the fingerprint."""
    found = set()
    base = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    for number, change in enumerate(({}, {"n_layer": 3}, {"n_embd": 48}, {"vocab_size": 336}, {"n_positions": 80})):
        folder = tmp_path / str(number)
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(**{**base, **change})).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        found.add(fingerprint(folder))
    assert len(found) == 5


@pytest.mark.parametrize(("name", "value"), [("num_attention_heads", 8), ("rope_theta", 500.0), ("rms_norm_eps", 0.1)])
def test_settings_without_a_tensor_count(tiny_models: dict[str, Path], tmp_path: Path, name: str, value: float) -> None:
    """The same weights cut into other heads, turned by another angle or normalized otherwise are another model."""
    before = computing_settings(AutoConfig.from_pretrained(tiny_models["llama"]))
    folder = copy(tiny_models["llama"], tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (settings["rope_parameters"] if name == "rope_theta" else settings)[name] = value
    (folder / "config.json").write_text(json.dumps(settings | {"transformers_version": "0", "use_cache": False}))
    after = computing_settings(AutoConfig.from_pretrained(folder))
    file = [folder / "model.safetensors"]
    assert fingerprint_of("x", after, stored_tensors(file)) != fingerprint_of("x", before, stored_tensors(file))
    assert sum(before[key] != after[key] for key in before) == 1


def test_the_serving_dtype_is_not_part_of_it(tiny_models: dict[str, Path]) -> None:
    """Tensors count as stored, before casting."""
    loaded = load_model(tiny_models["llama"], dtype="bfloat16")
    assert loaded.spec.fingerprint == fingerprint(tiny_models["llama"])
    assert loaded.spec.serving_dtype == "bfloat16"


def test_no_weights_at_all_are_refused(tmp_path: Path) -> None:
    """A folder whose only safetensors file is none that transformers would read."""
    folder = make_tiny_model(tmp_path / "model", "gpt2")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ModelRefusedError, match=r"no model\.safetensors"):
        load_model(folder)


def test_loading_shows_no_bar_and_leaves_none_off(
    tiny_models: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing on stderr while we load; the next load by anybody else shows its bar again (the control)."""
    transformers.utils.logging.enable_progress_bar()  # some command's test may have switched it off
    load_model(tiny_models["llama"])
    assert "Loading weights" not in capfd.readouterr().err
    AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    assert "Loading weights" in capfd.readouterr().err
