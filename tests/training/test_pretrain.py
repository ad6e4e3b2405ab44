"""Pre-training: what a window of text becomes for each architecture, and models that load as any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from promptd.demo import pretrain
from promptd.demo.shapes import OBJECTIVES, SENTINELS, SHAPES, Noise, take_embeddings
from promptd.engine.request import SamplingParams
from promptd.llm import LLM
from promptd.modeling import load_model
from tests.tiny_models import VOCAB_SIZE, make_tokenizer

WINDOW = np.arange(100, 357)


def _pair(name: str, seed: int) -> tuple[list[int], list[int]]:
    source, told = OBJECTIVES[name](WINDOW, 4096, np.random.default_rng(seed))
    return ([] if source is None else source.tolist()), told.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_what_is_cut_out_and_what_stays_are_the_window(seed: int) -> None:
    """Each sentinel of the source, replaced by the tokens that its name has in the target, gives the window back."""
    source, told = _pair("span_corruption", seed)
    assert told[0] == told[-1] == 0
    cut: dict[int, list[int]] = {}
    for token in told[1:-1]:
        if token >= 4096:
            cut[token] = []
        else:
            cut[max(cut)].append(token)
    assert list(cut) == [4096 + number for number in range(len(cut))] == [token for token in source if token >= 4096]
    assert [token for at in source for token in cut.get(at, [at])] == WINDOW.tolist()
    assert sum(map(len, cut.values())) == round(0.15 * len(WINDOW)) and all(cut.values())
    assert _pair("span_corruption", seed + 100)[0] != source


def test_masks_stand_for_spans_and_halves_for_a_prefix() -> None:
    """One mask a span, all alike, and the whole window told; a prefix language model goes on from the first half."""
    source, told = _pair("infilling", 3)
    kept, cut = Noise(0.3, 3.0).spans(len(WINDOW), np.random.default_rng(3))
    assert told == [0, *WINDOW] and [token for token in source if token >= 4096] == [4096] * len(cut)
    at = np.concatenate([np.arange(start, start + size) for start, size in zip(_starts(kept, cut), kept, strict=True)])
    assert [token for token in source if token < 4096] == WINDOW[at].tolist()
    assert _pair("prefix_lm", 0) == (WINDOW[:128].tolist(), [0, *WINDOW[128:]])
    assert _pair("next_token", 0) == ([], WINDOW.tolist())


def _starts(kept: np.ndarray, cut: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(kept + cut)[:-1]])


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_small_model_learns_and_is_served(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps on a text that repeats: the loss falls, from the checkpoint on too; what is exported is served, its
    sentinels tokens of the tokenizer."""
    make_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = np.tile(np.arange(5, 25, dtype=np.uint16), 400)
    text.tofile(tmp_path / "train.bin")
    text.tofile(tmp_path / "held_out.bin")
    sizes = {"vocab-size": VOCAB_SIZE, "hidden-size": 64, "num-layers": 1, "context": 32, "batch-tokens": 256}
    contexts = {"anneal-context": 32, "held-out-context": 32, "threads": 1}
    common = [text for name, value in {**sizes, **contexts}.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(pretrain, "WARMUP_TOKENS", 1000)

    def call(stage: str, tokens: int, *more: str) -> None:
        asked = ["pretrain", stage, "--shape", shape, "--out", str(tmp_path), "--tokens", str(tokens), "--eager"]
        monkeypatch.setattr("sys.argv", [*asked, *common, *more])
        pretrain.main()

    def loss(folder: str) -> float:
        facts = json.loads((tmp_path / folder / "pretraining.json").read_text())
        return float(facts["held_out_loss_nats_per_token"])

    call("anneal", 256, "--export", "first")
    call("train", 4096)
    call("anneal", 4096)
    assert loss("model") < loss("first") - 0.5
    model = load_model(tmp_path / "model")
    assert model.has_sources == (shape != "llama")
    (made,) = LLM(model).generate(["the quick"], [None], SamplingParams(temperature=0.0, max_tokens=4))
    assert made.token_ids
    sentinel = model.encode(SENTINELS[0], add_special_tokens=False)
    assert sentinel == [VOCAB_SIZE] if shape != "llama" else len(sentinel) > 1


def test_embeddings_are_taken_over_at_the_own_scale(tmp_path: Path) -> None:
    """Directions are the other model's, the spread is the own; sentinels stay as they were."""
    torch.manual_seed(0)
    other, own = (SHAPES[name].build(40, 64, 1) for name in ("llama", "t5"))
    other.save_pretrained(tmp_path)
    theirs, before = other.get_input_embeddings().weight.detach(), own.get_input_embeddings().weight.detach().clone()
    take_embeddings(own, tmp_path)
    after = own.get_input_embeddings().weight.detach()
    cosines = torch.nn.functional.cosine_similarity(after[:40], theirs)
    assert cosines.min() > 0.999 and after[:40].std() == pytest.approx(before.std().item(), rel=0.01)
    assert torch.equal(after[40:], before[40:])
    assert own.get_output_embeddings().weight is own.get_input_embeddings().weight
