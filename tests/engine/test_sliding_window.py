"""Models whose layers see a limited number of keys: rows of any shape are cut to it, each on its own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import MistralConfig, MistralForCausalLM

from tests.engine.harness import Case, assert_matches_oracle, greedy, library, make_engine, run
from tests.family_models import write_model
from tests.tiny_models import VOCAB_SIZE, make_tokenizer


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral with a window of eight keys."""
    config = MistralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, sliding_window=8,
    )  # fmt: skip
    return write_model(lambda: MistralForCausalLM(config), make_tokenizer(), tmp_path_factory.mktemp("mistral"))


@pytest.mark.parametrize("limits", [{}, {"num_blocks": 24, "block_size": 4, "prompt_tokens": 60}])
@pytest.mark.parametrize("seed", range(6))
def test_mixed_rows_keep_their_order(mistral: Path, limits: dict[str, int], seed: int) -> None:
    """Rows with one and with several spans, which the window cuts to the same number, get their own answers."""
    rng = random.Random(seed)
    prompts = library(mistral)
    cases = [
        Case(
            tuple(rng.choices(prompts, k=rng.randint(0, 2))),
            tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 30))),
            greedy(8),
            rng.randint(0, 4),
        )
        for _ in range(6)
    ]
    run(make_engine(mistral, **limits), cases)  # type: ignore[arg-type]
    for case in cases:
        assert len(case.tokens) == 8
        assert_matches_oracle(mistral, case)
