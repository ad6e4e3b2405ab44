"""Which models are served, and which are refused by name and layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from promptd.errors import ModelRefusedError
from promptd.modeling import load_model, probe
from tests.tiny_models import make_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
Make = Callable[[], Any]

SERVED: dict[str, Make] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SMALL, sliding_window=8)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, head_dim=8)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SMALL, head_dim=8)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SMALL)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SMALL)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**SMALL)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
}
REFUSED: dict[str, Make] = {
    "stablelm": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**SMALL)),
    "dynamic rope": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    ),
    "soft cap": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, head_dim=8)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4)),
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
            max_position_embeddings=128,
        )
    ),
    "gpt_j": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=128)
    ),
    "pegasus": lambda: hf.PegasusForConditionalGeneration(
        hf.PegasusConfig(vocab_size=320, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64)
    ),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2)),
}  # fmt: skip


def write(make: Make, folder: Path) -> Path:
    """Write a tiny random model with its tokenizer."""
    torch.manual_seed(0)
    make().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SERVED)
def test_these_pass_the_probe(name: str, tmp_path: Path) -> None:
    """The README's list: packed rows of every kind equal transformers' own forward."""
    model = load_model(write(SERVED[name], tmp_path))
    assert len(model.spec.max_key_abs) == 2


@pytest.mark.filterwarnings("ignore")  # some of these classes warn about their own configs
@pytest.mark.parametrize("name", REFUSED)
def test_these_are_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    """A typed error that says why; where a layer is at fault, it names the layer."""
    with pytest.raises(ModelRefusedError) as refused:
        load_model(write(REFUSED[name], tmp_path))
    assert "layer" in refused.value.message or "encoder-decoder" in refused.value.message


def test_pickled_weights_are_never_read(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A folder with nothing but `pytorch_model.bin` is refused before it is opened."""
    for file in tiny_models["llama"].glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelRefusedError, match="pickled"):
        load_model(tmp_path)


def test_the_probe_sees_a_wrong_attention(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with the merge of spans broken, the probe refuses a good model."""
    _break_merges(monkeypatch)
    with pytest.raises(ModelRefusedError, match="probe row"):
        load_model(tiny_models["llama"])


def write_deep(folder: Path, spread: float) -> Path:
    """A Llama of 16 layers whose weights pass rounding on, the wider spread the more."""
    config = hf.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=16, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=spread,
    )  # fmt: skip
    return write(lambda: hf.LlamaForCausalLM(config), folder)


def test_what_rounding_explains_is_measured_in_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep model differs by more than a share that suits all, and so does transformers from itself: it is served."""
    folder = write_deep(tmp_path, 0.24)
    assert load_model(folder, dtype="bfloat16").spec.serving_dtype == "bfloat16"
    monkeypatch.setattr(probe, "_NOISES", 0.0)
    with pytest.raises(ModelRefusedError, match=r"rounding explains 4\.00%"):
        load_model(folder, dtype="bfloat16")
    monkeypatch.undo()
    _break_merges(monkeypatch)
    with pytest.raises(ModelRefusedError, match="probe row"):  # what is wrong is more than that
        load_model(folder, dtype="bfloat16")


def test_rounding_does_not_explain_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose answers are rounding and little else is refused in 16 bits, and served in float32."""
    folder = write_deep(tmp_path, 0.4)
    _break_merges(monkeypatch)
    with pytest.raises(ModelRefusedError, match=r"rounding explains 20\.00%"):
        load_model(folder, dtype="bfloat16")
    monkeypatch.undo()
    assert load_model(folder).spec.serving_dtype == "float32"


def _break_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    from promptd.modeling import attention_pooled as pooled

    monkeypatch.setattr(pooled, "merge_parts", lambda outs, log_sums, parts: outs.unflatten(2, (parts, -1)).mean(2))
