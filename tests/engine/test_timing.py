"""What a tenant can tell by the clock of what others asked: nothing. What it asked itself: everything.

Each trial, a victim asks for a text (or uses a prompt) or does not; then an attacker asks for the very same under its
own name. A classifier that sees all that the engine's clock tells the attacker, steps and computed tokens to the first
one, is scored by the area under its ROC curve.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from promptd_store import encode
from sklearn.metrics import roc_auc_score

from promptd.engine.engine import Engine
from promptd.engine.request import GenerateRequest
from promptd.engine.share import Share
from tests.engine.harness import frozen, greedy, make_engine

VICTIM, ATTACKER = "victim", "attacker"


def ask(engine: Engine, number: str, text: tuple[int, ...], salt: str, prompt: torch.Tensor | None) -> float:
    """One request to its first token; returns what the attacker can see: the steps and the tokens they held."""
    prompts = () if prompt is None else (encode("soft", prompt),)
    engine.add_request(GenerateRequest(number, text, greedy(1), prompts, salt=salt, share=Share(salt, 1.0)))
    seen = 0.0
    while engine.has_work:
        outputs = engine.step()
        seen += 1 + engine.stats().last_step_num_tokens / 100
        engine.check_integrity()
        if outputs:
            assert outputs[-1].error is None
    return seen


def area(folder: Path, what: str, trials: int, *, attacker: str) -> float:
    """Area under the ROC curve of guessing, from the attacker's observation, whether the victim had asked."""
    engine = make_engine(folder, num_blocks=256, prompt_tokens=4096, max_num_batched_tokens=32, max_num_seqs=4)
    dice, generator = random.Random(13), torch.Generator().manual_seed(13)
    truth: list[int] = []
    seen: list[float] = []
    for trial in range(trials):
        text = tuple(dice.randrange(1, 300) for _ in range(100 if what == "text" else 3))
        prompt = None
        if what == "prompt":
            prompt = torch.randn(40, frozen(folder).spec.hidden_size, generator=generator)
        had_asked = dice.random() < 0.5
        other = tuple(dice.randrange(1, 300) for _ in range(100))
        ask(engine, f"v{trial}", text if had_asked else other, VICTIM, prompt if had_asked else None)
        seen.append(-ask(engine, f"a{trial}", text, attacker, prompt))
        truth.append(had_asked)
    return float(roc_auc_score(truth, seen))


def check(folder: Path, what: str, trials: int) -> None:
    """Score both classifiers."""
    other = area(folder, what, trials, attacker=ATTACKER)
    own = area(folder, what, trials, attacker=VICTIM)
    print(json.dumps({"what": what, "trials": trials, "auc_of_another_tenant": other, "auc_of_the_same": own}))
    assert other <= 0.55
    assert own >= 0.9


@pytest.mark.parametrize("what", ["text", "prompt"])
def test_nothing_to_be_told_from_steps(tiny_models: dict[str, Path], what: str) -> None:
    """Another tenant's cached text or resident prompt makes no step fewer; one's own does (the control)."""
    check(tiny_models["llama"], what, 24)


@pytest.mark.long
@pytest.mark.parametrize("what", ["text", "prompt"])
def test_nothing_in_five_hundred_trials(tiny_models: dict[str, Path], what: str) -> None:
    """500 trials."""
    check(tiny_models["llama"], what, 500)
