"""PEFT at batch size 1 as the oracle for T5 and BART: files that it wrote, answers that it gave, quirks and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from promptd_store import ArtifactError, encode, read_peft, to_peft, write_peft
from transformers import AutoModelForSeq2SeqLM

from promptd.engine.request import SamplingParams
from promptd.llm import LLM
from tests.engine.seq2seq_oracle import FIRST, LAST
from tests.peft_adapters import WARNS, adapter_configs

pytestmark = WARNS
TEXTS = [(FIRST, *range(5, 5 + length), LAST) for length in (3, 11, 24, 17)]
PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


def answer(tuned: Any, token_ids: tuple[int, ...], start: int) -> tuple[int, ...]:
    """PEFT's greedy continuation, from its forward pass, token by token."""
    ids = torch.tensor([token_ids])
    target = [start]
    with torch.no_grad():
        for _ in range(PARAMS.max_tokens):
            output = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([target]))
            target.append(int(output.logits[0, -1].argmax()))
    return tuple(target[1:])


def tuned_model(folder: Path, config: Any, seed: int) -> Any:
    """A PEFT model whose prompt counts."""
    torch.manual_seed(seed)
    tuned = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(folder), config).eval()
    with torch.no_grad():
        for parameter in tuned.prompt_encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return tuned


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_answers_equal_pefts(tiny_seq2seq: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Adapters of every kind, saved by PEFT, loaded by us, mixed in one batch: PEFT's own answers, one request at a
    time; and back bit for bit. (T5 has an even number of layers, where half of PEFT's slots never act, BART an odd.)"""
    folder = tiny_seq2seq[family]
    llm = LLM(folder)
    start = llm.model.hf.config.decoder_start_token_id
    folders, expected = [], []
    for number, (name, config) in enumerate(adapter_configs("SEQ_2_SEQ_LM").items()):
        tuned = tuned_model(folder, config, number)
        expected.append(answer(tuned, TEXTS[number], start))  # type: ignore[arg-type]
        folders.append(tmp_path / name)
        tuned.save_pretrained(folders[-1])
    found = llm.generate(TEXTS, prompts=folders, params=PARAMS)
    assert [completion.token_ids for completion in found] == expected
    shifted = llm.generate(TEXTS, [*folders[1:], folders[0]], PARAMS)
    assert [completion.token_ids for completion in shifted] != expected  # control
    for at in folders:
        write_peft(read_peft(at, llm.model.spec), tmp_path / "again")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (at / file).read_bytes()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_pefts_layers_are_read_as_peft_reads_them(tiny_seq2seq: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Decoder layer l reads stored slot 2l modulo their number. Control: read straight, the answer is another."""
    folder = tiny_seq2seq[family]
    llm = LLM(folder)
    tuned = tuned_model(folder, adapter_configs("SEQ_2_SEQ_LM")["prefix"], 3)
    tuned.save_pretrained(tmp_path)
    artifact = read_peft(tmp_path, llm.model.spec)
    prefix, num_layers = artifact.tensors["prefix"], llm.model.spec.num_layers
    order = [2 * layer % num_layers for layer in range(num_layers)]
    assert order == ([0, 2, 0, 2] if num_layers == 4 else [0, 2, 1])
    flat = tuned.prompt_encoder["default"].embedding.weight.detach()
    shape = (flat.shape[0], num_layers, 2, llm.model.spec.num_kv_heads, llm.model.spec.head_dim)
    straight = flat.view(shape).permute(1, 2, 3, 0, 4)
    assert torch.equal(prefix, straight[order])
    expected = answer(tuned, TEXTS[2], llm.model.hf.config.decoder_start_token_id)  # type: ignore[arg-type]
    quirk, other = llm.generate([TEXTS[2]] * 2, [artifact, encode("prefix", straight.contiguous())], PARAMS)
    assert quirk.token_ids == expected
    assert other.token_ids != expected


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_peft_reads_what_we_write(tiny_seq2seq: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Soft prompts, and prefixes where PEFT's slots can say them, give PEFT our answers; others are refused."""
    folder = tiny_seq2seq[family]
    llm = LLM(folder)
    spec, generator = llm.model.spec, torch.Generator().manual_seed(1)
    start = llm.model.hf.config.decoder_start_token_id
    soft = encode("soft", torch.randn(5, spec.hidden_size, generator=generator) * llm.model.embedding_std)
    shape = (spec.num_layers, 2, spec.num_kv_heads, 4, spec.head_dim)
    prefix = torch.randn(shape, generator=generator)
    if spec.num_layers % 2 == 0:
        with pytest.raises(ArtifactError, match="one slot"):
            to_peft(encode("prefix", prefix), spec=spec)
        prefix = prefix[[2 * layer % spec.num_layers for layer in range(spec.num_layers)]]
    for name, artifact in {"soft": soft, "prefix": encode("prefix", prefix)}.items():
        write_peft(artifact, tmp_path / name, spec=spec)
        tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(folder), tmp_path / name).eval()
        (found,) = llm.generate(TEXTS[1:2], [artifact], PARAMS)
        assert found.token_ids == answer(tuned, TEXTS[1], start)  # type: ignore[arg-type]
        assert found.token_ids == llm.generate(TEXTS[1:2], [tmp_path / name], PARAMS)[0].token_ids
    whole = encode("prefix", torch.randn(spec.prefix_layers[1], *shape[1:], generator=generator))
    with pytest.raises(ArtifactError, match="banks"):
        to_peft(whole, spec=spec)


def test_flan_shapes_have_no_prefix_in_peft_but_one_of_ours(tiny_seq2seq: dict[str, Path], tmp_path: Path) -> None:
    """Where heads * d_kv is not d_model, PEFT's file does not fit and is refused by its shape; our layout works."""
    llm = LLM(tiny_seq2seq["t5-v1.1"])
    spec = llm.model.spec
    assert spec.num_kv_heads * spec.head_dim != spec.hidden_size
    tuned_model(tiny_seq2seq["t5-v1.1"], adapter_configs("SEQ_2_SEQ_LM")["prefix"], 0).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError) as refused:
        read_peft(tmp_path, spec)
    assert refused.value.code == "shape_mismatch"
    own = encode("prefix", torch.randn(spec.num_layers, 2, spec.num_kv_heads, 3, spec.head_dim))
    with_prefix, bare = llm.generate([TEXTS[0]] * 2, [own, None], PARAMS)
    assert with_prefix.token_ids != bare.token_ids
