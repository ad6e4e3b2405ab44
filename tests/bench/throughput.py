"""W1: many requests, each with its own soft prompt, against the peers; and what mixing costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from promptd_store import PromptArtifact

from promptd.bench import Lengths
from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.modeling import FrozenModel
from tests.bench.book import Book, Row, paired_ratio
from tests.bench.models import folder_of, frozen
from tests.bench.peers import ContinuousBatching, PeftOneAtATime, StackedEmbeddings, plain_model
from tests.bench.rows import Outcome, Tokens, fresh_tokens, make_engine, prefixes, request, run, soft_prompts
from tests.bench.scale import Scale

OURS, OURS_FIRST = "promptd", "promptd, prompts never seen before"
PEFT, STACKED, PLAIN = "PEFT, one at a time", "transformers, stacked embeddings", "transformers, continuous batching"
PEFT_TARGET, STACKED_TARGET, MIXING_TARGET, OVERHEAD_TARGET = 6.0, 1.5, 0.97, 0.08


class W1:
    """All contenders over the same weights, alternating."""

    def __init__(self, scale: Scale, root: Path) -> None:
        self._scale = scale
        folder = folder_of(scale.w1_model, root)
        self._model = frozen(folder)
        hidden = self._model.spec.hidden_size
        self._prompts = soft_prompts(scale.num_requests, scale.virtual_tokens, hidden)
        tensors = [prompt.tensors["prompt_embeddings"] for prompt in self._prompts]
        self._tensors = tensors
        self.engine = engine_of(scale, root)
        peer = plain_model(folder)
        self._stacked = StackedEmbeddings(peer, scale.max_num_seqs)
        self._peft = PeftOneAtATime(peer, tensors[: scale.num_peft_requests])
        self._plain = ContinuousBatching(plain_model(folder), scale.max_num_seqs)
        self.contenders: dict[str, Callable[[], float]] = {
            OURS: lambda: self._ours(self._prompts),
            OURS_FIRST: lambda: self._ours(soft_prompts(scale.num_requests, scale.virtual_tokens, hidden)),
            STACKED: lambda: self._rate(self._stacked.run(tensors, self._texts(), scale.output_tokens)),
            PEFT: lambda: self._rate(
                self._peft.run(self._texts()[: scale.num_peft_requests], scale.output_tokens),
                scale.num_peft_requests,
            ),
            PLAIN: lambda: self._rate(self._plain.run(self._texts(), scale.output_tokens)),
        }

    def num_requests(self, name: str) -> int:
        """Requests that a contender answers in one run."""
        return self._scale.num_peft_requests if name == PEFT else self._scale.num_requests

    def _texts(self) -> list[Tokens]:
        scale, vocab_size = self._scale, self._model.spec.vocab_size
        return [fresh_tokens(scale.input_tokens, vocab_size) for _ in range(scale.num_requests)]

    def _ours(self, prompts: list[PromptArtifact]) -> float:
        texts = zip(self._texts(), prompts, strict=True)
        outcome = run(self.engine, [request(text, self._scale.output_tokens, prompt) for text, prompt in texts])
        return self._rate((outcome.seconds, list(outcome.tokens.values())))

    def _rate(self, result: tuple[float, list[list[int]]], num_requests: int | None = None) -> float:
        """Output tokens per second; every request must have made all of its tokens."""
        seconds, answers = result
        expected = [self._scale.output_tokens] * (num_requests or self._scale.num_requests)
        if [len(answer) for answer in answers] != expected:
            raise RuntimeError(f"expected {expected} tokens, got {[len(answer) for answer in answers]}")
        return sum(expected) / seconds

    def agreement(self) -> tuple[float, int]:
        """Warm up on the same requests; return the share of tokens equal to transformers', and distinct answers."""
        texts, out = self._texts(), self._scale.output_tokens
        few = self._scale.num_peft_requests
        outcome = run(self.engine, [request(t, out, p) for t, p in zip(texts, self._prompts, strict=True)])
        ours = list(outcome.tokens.values())
        _, stacked = self._stacked.run(self._tensors, texts, out)
        _, alone = self._peft.run(texts[:few], out)
        self._plain.run(texts, out)
        pairs = [*zip(ours, stacked, strict=True), *zip(ours[:few], alone, strict=True)]
        equal = [a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]
        return statistics.mean(equal), len(set(map(tuple, ours)))


def engine_of(scale: Scale, root: Path) -> Engine:
    """The engine of W1, with room for its prompts twice."""
    row = scale.input_tokens + scale.output_tokens + scale.virtual_tokens + 16
    return make_engine(
        frozen(folder_of(scale.w1_model, root)),
        max_num_seqs=scale.max_num_seqs,
        text_tokens=3 * row * scale.num_requests,
        prompt_tokens=2 * scale.num_requests * scale.virtual_tokens,
    )


def check_w1(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Throughput against the peers, in rounds of one run each."""
    names = (OURS, OURS_FIRST, STACKED, PEFT, PLAIN)
    if any(len(book.series(f"w1/{name}")) < scale.num_rounds for name in names):
        w1 = W1(scale, root)
        share, distinct = w1.agreement()
        book.note("w1/agreement", share)
        book.note("w1/distinct", distinct)
        for number in range(scale.num_rounds):
            for name in names:
                if len(book.series(f"w1/{name}")) <= number:
                    used = time.process_time()
                    rate = w1.contenders[name]()
                    book.add(f"w1/{name}/cpu_seconds", [(time.process_time() - used) / w1.num_requests(name)])
                    book.add(f"w1/{name}", [rate])
    rates = {name: book.series(f"w1/{name}")[: scale.num_rounds] for name in names}
    cpu = {name: book.series(f"w1/{name}/cpu_seconds")[: scale.num_rounds] for name in names}
    rows = [
        Row(f"W1: {name}", "", f"{statistics.median(rates[name]):.1f} tokens/s ({_all(rates[name])})") for name in names
    ]
    for ours in (OURS, OURS_FIRST):
        for peer, target in ((PEFT, PEFT_TARGET), (STACKED, STACKED_TARGET)):
            ratio = paired_ratio(rates[ours], rates[peer])
            shown = f"{ratio:.2f} x"
            if torch.get_num_threads() == 1:  # waiting threads burn time too, so that it means something for one only
                shown += f" ({paired_ratio(cpu[peer], cpu[ours]):.2f} x by CPU time)"
            rows.append(Row(f"W1: {ours} : {peer}", f">= {target} x", shown, ratio >= target))
    rows.append(
        Row(
            "W1: greedy tokens equal to transformers' and PEFT's",
            "",
            f"{book.fact('w1/agreement'):.2%}, {book.fact('w1/distinct')} distinct answers",
        )
    )
    return rows


def check_mixing(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Rows under prompts against bare rows of the same engine with as many keys: text prefixes that are cached."""
    alike, various = Lengths(scale.virtual_tokens, scale.virtual_tokens), Lengths(*scale.mixed_virtual_tokens)
    cases = (
        ("mixing", "W1", ("soft",), alike),
        ("mixing_kinds", "soft, prefix or none in turn", ("soft", "prefix", "none"), various),
    )
    return [_mixing(scale, book, root, *case) for case in cases]


def _mixing(
    scale: Scale, book: Book, root: Path, key: str, title: str, kinds: tuple[str, ...], lengths: Lengths
) -> Row:
    missing = scale.num_mixing_pairs - len(book.series(f"{key}/bare"))
    if missing > 0:
        model, count = frozen(folder_of(scale.w1_model, root)), scale.num_requests
        kind_of = [kinds[at % len(kinds)] for at in range(count)]
        # Whole blocks only can be cached, so lengths are rounded up; both sides get the same number of keys.
        size = EngineConfig.block_size
        keys = [
            0 if kind == "none" else -(-lengths.spread(at, count) // size) * size for at, kind in enumerate(kind_of)
        ]
        chains = [_prompt(kind, length, model) for kind, length in zip(kind_of, keys, strict=True)]
        row = scale.input_tokens + scale.output_tokens + 2 * size
        engine = make_engine(
            model,
            max_num_seqs=scale.max_num_seqs,
            text_tokens=3 * (row * count + sum(keys)),
            prompt_tokens=2 * sum(keys),
            prefix_caching=True,
        )
        vocab_size = model.spec.vocab_size
        cached = [fresh_tokens(length, vocab_size) for length in keys]

        def texts() -> list[Tokens]:
            return [fresh_tokens(scale.input_tokens, vocab_size) for _ in range(count)]

        def mixed() -> float:
            asked = [request(t, scale.output_tokens, *chain) for t, chain in zip(texts(), chains, strict=True)]
            return _rate_of(run(engine, asked), [0] * count)

        def bare() -> float:
            asked = [request(c + t, scale.output_tokens) for t, c in zip(texts(), cached, strict=True)]
            return _rate_of(run(engine, asked), keys)

        run(engine, [request((*text, 1), 1) for text in cached])
        mixed()
        bare()
        for number in range(missing):
            first, second = (mixed, bare) if number % 2 else (bare, mixed)
            rates = {first: first(), second: second()}
            book.add(f"{key}/mixed", [rates[mixed]])
            book.add(f"{key}/bare", [rates[bare]])
    ours, bare_rates = (book.series(f"{key}/{name}")[: scale.num_mixing_pairs] for name in ("mixed", "bare"))
    ratio = paired_ratio(ours, bare_rates)
    shown = f"{ratio:.3f} x ({statistics.median(ours):.1f} : {statistics.median(bare_rates):.1f} tokens/s)"
    what = f"mixing: {title}, {lengths} tokens : bare rows with as many keys"
    return Row(what, f">= {MIXING_TARGET} x", shown, ratio >= MIXING_TARGET)


def _prompt(kind: str, length: int, model: FrozenModel) -> list[PromptArtifact]:
    if kind == "none":
        return []
    return soft_prompts(1, length, model.spec.hidden_size) if kind == "soft" else prefixes(1, length, model)


def check_overhead(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Engine time outside the model's forward pass, in the steps in which all rows decode."""
    if not book.series("overhead/share"):
        engine = engine_of(scale, root)
        vocab_size, count = engine.model.spec.vocab_size, scale.num_requests
        prompts = soft_prompts(count, scale.virtual_tokens, engine.model.spec.hidden_size)
        steps: list[tuple[float, float]] = []
        for _ in range(2):  # the first makes the prompts resident
            asked = [request(fresh_tokens(scale.input_tokens, vocab_size), scale.output_tokens, p) for p in prompts]
            steps = run(engine, asked, full_rows=scale.max_num_seqs).decode_steps
        book.add("overhead/step_ms", [1e3 * step for step, _ in steps])
        book.add("overhead/share", [1 - inside / step for step, inside in steps])
    share = statistics.median(book.series("overhead/share"))
    step = statistics.median(book.series("overhead/step_ms"))
    shown = f"{share:.1%} of {step:.1f} ms ({share * step:.2f} ms, {len(book.series('overhead/share'))} steps)"
    name = f"engine time outside the forward pass, {scale.max_num_seqs} rows"
    return [Row(name, f"<= {OVERHEAD_TARGET:.0%} of a decode step", shown, share <= OVERHEAD_TARGET)]


def _rate_of(outcome: Outcome, cached_tokens: list[int]) -> float:
    if [outcome.cached_tokens[one] for one in outcome.tokens] != cached_tokens:
        raise RuntimeError(f"expected {cached_tokens} cached tokens a row, got {outcome.cached_tokens}")
    return outcome.num_tokens / outcome.seconds


def _all(values: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)
