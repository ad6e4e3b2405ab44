"""PEFT's own files, made and read by the real peft: in and out without a changed bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from promptd_store import (
    ArtifactError,
    BaseModelSpec,
    PromptKind,
    decode,
    encode,
    read_peft,
    to_peft,
    write_peft,
)
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

SHARED = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0}


def gpt2() -> PreTrainedModel:
    """Full heads."""
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **SHARED))


def llama() -> PreTrainedModel:
    """Grouped heads of a size that hidden_size does not tell."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, head_dim=16, **sizes, **SHARED))


def spec_of(model: PreTrainedModel) -> BaseModelSpec:
    """The spec of a random model, with bounds wide enough for PEFT's random initialisation."""
    config = model.config
    num_heads = config.num_attention_heads
    return BaseModelSpec(
        architecture=type(model).__name__,
        fingerprint="sha256:" + "c" * 64,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        num_attention_heads=num_heads,
        max_model_len=64,
        serving_dtype="float32",
        max_embedding_abs=10.0,
        max_key_abs=(10.0,) * 3,
        max_value_abs=(10.0,) * 3,
    )


CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "PREFIX_TUNING projected": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8
    ),
    "CARTRIDGE": lambda: peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


def saved(make: Callable[[], PreTrainedModel], peft_type: str, folder: Path) -> tuple[PreTrainedModel, Any]:
    """A base model, and PEFT's model whose adapter was saved to the folder."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(make(), CONFIGS[peft_type]())
    adapted.save_pretrained(folder)
    return adapted.get_base_model(), adapted.eval()


@pytest.mark.parametrize("peft_type", CONFIGS)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_import_and_export_are_bit_exact(make: Callable[[], PreTrainedModel], peft_type: str, tmp_path: Path) -> None:
    """A PEFT folder comes back byte for byte, weights and config, and is loaded by the real peft again."""
    base, _ = saved(make, peft_type, tmp_path / "in")
    artifact = read_peft(tmp_path / "in", spec_of(base))
    assert artifact.num_virtual_tokens == 5
    is_soft = peft_type in ("PROMPT_TUNING", "P_TUNING")
    assert artifact.kind is (PromptKind.SOFT if is_soft else PromptKind.PREFIX)
    write_peft(artifact, tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    peft.PeftModel.from_pretrained(make(), tmp_path / "out")


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_prefix_is_what_peft_feeds(make: Callable[[], PreTrainedModel], peft_type: str, tmp_path: Path) -> None:
    """The canonical tensor equals, layer by layer, the K/V cache that PEFT hands to the model."""
    base, adapted = saved(make, peft_type, tmp_path)
    tensor = read_peft(tmp_path, spec_of(base)).tensors["prefix"]
    cache = adapted.get_prompt(batch_size=1)
    for layer in range(3):
        assert torch.equal(tensor[layer, 0], cache.layers[layer].keys[0])
        assert torch.equal(tensor[layer, 1], cache.layers[layer].values[0])


def test_soft_prompt_is_what_peft_feeds(tmp_path: Path) -> None:
    """The canonical tensor equals the embeddings that PEFT puts in front, after P-tuning's encoder."""
    base, adapted = saved(llama, "P_TUNING", tmp_path)
    assert torch.equal(read_peft(tmp_path, spec_of(base)).tensors["prompt_embeddings"], adapted.get_prompt(1)[0])


@pytest.mark.parametrize("kind", ["soft", "prefix"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_native_prompts_are_exported_as_peft_writes_them(
    make: Callable[[], PreTrainedModel], kind: str, tmp_path: Path
) -> None:
    """A native prompt's export loads in the real peft, which saves it again with the same bytes but for its version."""
    model = make()
    spec = spec_of(model)
    shape = (5, 32) if kind == "soft" else (3, 2, spec.num_kv_heads, 5, spec.head_dim)
    artifact = encode(kind, torch.randn(shape))
    write_peft(artifact, tmp_path / "ours", spec=spec)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / who / "adapter_config.json").read_bytes() for who in ("ours", "theirs"))
    assert ours == json.dumps(json.loads(ours), indent=2, sort_keys=True).encode()
    ours_config, theirs_config = json.loads(ours), json.loads(theirs)
    assert ours_config | {"peft_version": "any"} == theirs_config | {"peft_version": "any"}
    weights = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs")]
    assert weights[0] == weights[1]
    back = read_peft(tmp_path / "theirs", spec)
    assert back.version == artifact.version


def test_export_without_a_spec_loads_too(tmp_path: Path) -> None:
    """A soft prompt does not know the base's depth and heads; peft fills them in."""
    write_peft(encode("soft", torch.randn(5, 32)), tmp_path)
    peft.PeftModel.from_pretrained(llama(), tmp_path)


def test_half_precision_keeps_its_bytes(tmp_path: Path) -> None:
    """A bf16 file, which PEFT itself would widen on saving, comes back as it was."""
    base, _ = saved(llama, "PROMPT_TUNING", tmp_path)
    config = (tmp_path / "adapter_config.json").read_bytes()
    weights = to_peft(encode("soft", torch.randn(5, 32).bfloat16()))[1]
    assert to_peft(read_peft((config, weights), spec_of(base))) == (config, weights)


def test_canonical_prefix_without_a_manifest_is_flattened() -> None:
    """A bare file in our own layout is not PEFT's: its export is."""
    spec = spec_of(llama())
    native = encode("prefix", torch.randn(3, 2, 2, 5, 16))
    bare = decode(_without_manifest(native.content), spec)
    assert not bare.is_native
    assert to_peft(bare)[1] == to_peft(native)[1] != bare.content


def _without_manifest(content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.parametrize(
    "artifact",
    [
        encode("text", text="hello"),
        encode("soft", torch.randn(2, 32), prompt_after_bos=True),
        encode("soft", torch.randn(2, 32), position_convention="unshifted"),
    ],
)
def test_what_peft_cannot_express_is_not_exported(artifact: Any, tmp_path: Path) -> None:
    """Exporting a prompt that PEFT would serve differently is a typed error, and nothing is written."""
    with pytest.raises(ArtifactError) as caught:
        write_peft(artifact, tmp_path / "out")
    assert caught.value.code == "not_exportable"
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    """A folder with adapter_model.bin only is refused with a reason; the pickle is not opened."""
    base, adapted = saved(llama, "PROMPT_TUNING", tmp_path)
    adapted.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError) as caught:
        read_peft(tmp_path, spec_of(base))
    assert caught.value.code == "peft_file_missing" and "pickle" in caught.value.message


def test_folder_of_another_base_is_refused(tmp_path: Path) -> None:
    """A prefix made for full heads does not fit a model with grouped heads, and the message says why."""
    saved(gpt2, "PREFIX_TUNING", tmp_path)
    with pytest.raises(ArtifactError) as caught:
        read_peft(tmp_path, spec_of(llama()))
    assert caught.value.code == "shape_mismatch"
    assert caught.value.param in ("num_attention_heads", "token_dim")
