"""`promptd plan`: its numbers against the loaded model's and against a cache that is really simulated."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from promptd.cli import app
from promptd.commands.plan import parse_bytes
from promptd.planning import ModelShape, fleet_hit_ratios, make_plan, zipf_hit_ratio
from tests.engine.harness import frozen

PAGE = (Path(__file__).parents[2] / "server" / "docs" / "scaling.md").read_text()


def planned(*words: str, code: int = 0) -> dict[str, float]:
    """What the command prints."""
    done = CliRunner().invoke(app, ["plan", "--json", *words])
    assert done.exit_code == code, done.output
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_sizes_are_the_models_own(tiny_models: dict[str, Path], family: str) -> None:
    """Weights and K/V are counted as transformers and the engine's own cache count them."""
    folder = tiny_models[family]
    words = ("--model", str(folder), "--dtype", "float32", "--gpu-bytes", "64MiB", "--prompts", "100000")
    facts = planned(*words, "--prompt-tokens", "7")
    weights = {one.data_ptr(): one.numel() for one in AutoModelForCausalLM.from_pretrained(folder).parameters()}
    assert facts["weights_bytes"] == 4 * sum(weights.values())
    spec = frozen(folder).spec
    assert facts["kv_bytes_per_token"] == 4 * 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    assert facts["resident_prompt_bytes"] == 7 * facts["kv_bytes_per_token"]
    assert facts["soft_files_bytes"] == 100_000 * 7 * spec.hidden_size * 4
    parts = ("weights_bytes", "step_bytes", "texts_bytes", "free_for_prompts_bytes")
    assert sum(facts[part] for part in parts) == 64 << 20
    assert facts["resident_prompts"] == facts["free_for_prompts_bytes"] // facts["resident_prompt_bytes"]
    assert facts["servers_for_all_prompts"] == -(-100_000 // facts["resident_prompts"])


def test_what_does_not_fit_is_said(tiny_models: dict[str, Path]) -> None:
    """A device that is too small ends with status 1; the numbers are printed all the same."""
    facts = planned("--model", str(tiny_models["llama"]), "--gpu-bytes", "1MiB", code=1)
    assert facts["resident_prompts"] == 0 and facts["servers_for_all_prompts"] is None


def test_the_table(tiny_models: dict[str, Path]) -> None:
    """People get a table with the same numbers."""
    words = ["plan", "--model", str(tiny_models["llama"]), "--gpu-bytes", "64MiB", "--prompts", "20", "--servers", "2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "20 resident, all of them" in done.output, done.output
    assert "100.0% spread by load" in done.output


@pytest.mark.parametrize(
    ("text", "size"), [("80e9", 80 * 10**9), ("24GiB", 24 << 30), ("16G", 16 * 10**9), ("1.5 kb", 1500), ("7", 7)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    """As people write them."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["much", "-1", "1 XB", ""])
def test_bad_sizes(text: str) -> None:
    """What is no size is said to be none."""
    done = CliRunner().invoke(app, ["plan", "--gpu-bytes", text])
    assert done.exit_code != 0 and "Traceback" not in done.output


class Lru:
    """A cache that is really run."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: OrderedDict[int, None] = OrderedDict()

    def ask(self, prompt: int) -> bool:
        """Whether it was there; it is now."""
        is_hit = prompt in self._held
        self._held[prompt] = None
        self._held.move_to_end(prompt)
        if len(self._held) > self._size:
            self._held.popitem(last=False)
        return is_hit


def simulated(num_prompts: int, num_resident: int, num_servers: int, exponent: float, *, routed: bool) -> float:
    """Hit ratio of servers under Zipf traffic, once their caches are full."""
    dice = np.random.default_rng(1)
    shares = np.arange(1, num_prompts + 1, dtype=float) ** -exponent
    asked = dice.choice(num_prompts, size=120_000, p=shares / shares.sum())
    home = dice.integers(num_servers, size=num_prompts)
    anywhere = dice.integers(num_servers, size=len(asked))
    caches = [Lru(num_resident) for _ in range(num_servers)]
    hits = [caches[home[one] if routed else where].ask(int(one)) for one, where in zip(asked, anywhere, strict=True)]
    return float(np.mean(hits[40_000:]))


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
@pytest.mark.parametrize(("num_resident", "num_servers"), [(50, 1), (100, 4), (400, 1)])
def test_hit_ratios_are_those_of_a_cache(num_resident: int, num_servers: int, exponent: float) -> None:
    """The formula is within two points of caches that are run; the two ways to route differ by more than that."""
    spread, routed = fleet_hit_ratios(3000, num_resident, num_servers, exponent=exponent)
    assert abs(spread - simulated(3000, num_resident, num_servers, exponent, routed=False)) < 0.02
    assert abs(routed - simulated(3000, num_resident, num_servers, exponent, routed=True)) < 0.02
    assert (routed - spread > 0.02) == (num_servers > 1)


def test_hit_ratios_at_the_ends() -> None:
    """Nothing resident is never found, everything always; more is never worse."""
    assert zipf_hit_ratio(100, 0) == 0.0 and zipf_hit_ratio(100, 100) == 1.0
    ratios = [zipf_hit_ratio(1000, size) for size in (1, 10, 100, 500, 999)]
    assert ratios == sorted(ratios) and len(set(ratios)) == 5


@pytest.mark.parametrize(
    ("shape", "gpu_bytes", "row_tokens"),
    [
        (ModelShape(494_032_768, 896, 24, 2, 64, 151_936, 2), 24 << 30, 1024),  # Qwen2-0.5B
        (ModelShape(8_030_261_248, 4096, 32, 8, 128, 128_256, 2), 80_000_000_000, 2048),  # Llama-3-8B
    ],
)
def test_the_pages_prompts(shape: ModelShape, gpu_bytes: int, row_tokens: int) -> None:
    """What the page says of two models is what is computed."""
    plan = make_plan(
        shape, gpu_bytes=gpu_bytes, num_prompts=1_000_000, prompt_tokens=20, num_rows=64, row_tokens=row_tokens
    )
    assert f"({shape.kv_bytes_per_token:,} bytes" in PAGE
    assert re.search(rf"\b{plan.num_resident:,}\b", PAGE), plan.num_resident


def table() -> dict[tuple[int, float], str]:
    """The page's hit ratios, by resident prompts and exponent."""
    rows = re.findall(r"^\| ([\d,]+) \| (.+) \| (.+) \| (.+) \|$", PAGE, re.MULTILINE)
    cells = ((int(row[0].replace(",", "")), row[1:]) for row in rows)
    return {
        (size, exponent): cell for size, found in cells for exponent, cell in zip((0.8, 1.0, 1.2), found, strict=True)
    }


def shown_ratios(num_resident: int, exponent: float) -> str:
    """How the page writes a cell, of 1,000,000 prompts on 100 servers."""
    ratios = fleet_hit_ratios(1_000_000, num_resident, 100, exponent=exponent)
    return " / ".join(f"{one:.0%}".replace("%", " %") for one in ratios)


def test_one_of_the_pages_hit_ratios() -> None:
    """It is what is computed."""
    assert table()[1000, 1.0] == shown_ratios(1000, 1.0)


@pytest.mark.long
def test_the_pages_hit_ratios() -> None:
    """All of them are."""
    assert table() == {cell: shown_ratios(*cell) for cell in table()} and len(table()) == 15
