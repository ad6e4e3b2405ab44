"""T5 and BART: ragged requests in mixed batches, with a prompt each or none; and transformers' padded `generate`."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers as hf
from promptd_store import PromptArtifact, encode

from promptd.engine.request import GenerateRequest
from promptd.modeling import load_model
from tests.bench.book import Book, Row, paired_ratio
from tests.bench.peers import quiet
from tests.bench.rows import Tokens, make_engine, request, run
from tests.bench.scale import Scale
from tests.family_models import SEQ2SEQ, make_encoder_tokenizer, write_model

MIXING_TARGET, PADDED_TARGET = 0.95, 1.5
INPUT, OUTPUT = (16, 128), (8, 64)
"""Tokens of a request and of its answer, uniform."""
NUM_PROMPTS = 16


def _t5_small() -> hf.T5ForConditionalGeneration:
    return hf.T5ForConditionalGeneration(hf.T5Config(decoder_start_token_id=0))


def _bart_base() -> hf.BartForConditionalGeneration:
    sizes = {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
    heads = {"encoder_attention_heads": 12, "decoder_attention_heads": 12, "forced_eos_token_id": None}
    return hf.BartForConditionalGeneration(hf.BartConfig(**sizes, **heads, init_std=0.05))  # type: ignore[arg-type]


FULL: dict[str, Callable[[], hf.PreTrainedModel]] = {"t5-small": _t5_small, "bart-base": _bart_base}
TINY: dict[str, Callable[[], hf.PreTrainedModel]] = {name: SEQ2SEQ[name] for name in ("t5", "bart")}


class Contenders:
    """One engine and transformers' own model over the same weights."""

    def __init__(self, name: str, make: Callable[[], hf.PreTrainedModel], scale: Scale, root: Path) -> None:
        folder = root / f"seq2seq-{name}"
        if not (folder / "tokenizer.json").exists():
            with quiet():
                write_model(make, make_encoder_tokenizer(), folder)
        self._model = load_model(folder)
        self._scale, spec = scale, self._model.spec
        self.longest = min(INPUT[1], spec.max_model_len - 2 * scale.virtual_tokens)
        row = INPUT[1] + OUTPUT[1] + scale.virtual_tokens + 32
        self._engine = make_engine(
            self._model,
            max_num_seqs=scale.max_num_seqs,
            text_tokens=2 * row * scale.max_num_seqs,
            prompt_tokens=2 * NUM_PROMPTS * scale.virtual_tokens,
        )
        count, generator = scale.virtual_tokens, torch.Generator().manual_seed(1)
        softs = [torch.randn(count, spec.hidden_size, generator=generator) for _ in range(NUM_PROMPTS)]
        self.softs = [encode("soft", soft * self._model.embedding_std) for soft in softs]
        shape = (spec.num_layers, 2, spec.num_kv_heads, count, spec.head_dim)
        self.prefixes = [encode("prefix", torch.randn(shape, generator=generator)) for _ in range(NUM_PROMPTS)]
        with quiet():
            self._peer = hf.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._peer.generation_config.eos_token_id = None  # as `ignore_eos`
        self._peer.generation_config.forced_eos_token_id = None

    def requests(self, seed: int, extra: int = 0) -> list[tuple[Tokens, int]]:
        """Ragged requests; the same lengths for the same seed, the texts `extra` tokens longer."""
        rng = random.Random(seed)
        sizes = [(rng.randint(INPUT[0], self.longest), rng.randint(*OUTPUT)) for _ in range(self._scale.num_requests)]
        vocab_size = self._model.spec.vocab_size
        return [(tuple(rng.randrange(1, vocab_size) for _ in range(own + extra)), out) for own, out in sizes]

    def ours(self, asked: Sequence[tuple[Tokens, int]], prompts: Sequence[PromptArtifact] = ()) -> list[list[int]]:
        """Continuous batching, the prompts in turn, or none."""
        chains = [(prompts[number % len(prompts)],) if prompts else () for number in range(len(asked))]
        requests: list[GenerateRequest] = [
            request(text, out, *chain) for (text, out), chain in zip(asked, chains, strict=True)
        ]
        answers = list(run(self._engine, requests).tokens.values())
        if [len(answer) for answer in answers] != [out for _, out in asked]:
            raise RuntimeError("a request has not made all of its tokens")
        return answers

    @torch.no_grad()
    def padded(self, asked: Sequence[tuple[Tokens, int]]) -> list[list[int]]:
        """Transformers' `generate` on static padded batches of as many rows, each until its longest answer is there."""
        answers = []
        for start in range(0, len(asked), self._scale.max_num_seqs):
            batch = asked[start : start + self._scale.max_num_seqs]
            tensors = [torch.tensor(text) for text, _ in batch]
            ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            mask = (torch.arange(ids.shape[1]) < torch.tensor([len(text) for text, _ in batch]).unsqueeze(1)).long()
            with quiet():
                made = self._peer.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max(out for _, out in batch)
                )
            answers += [row[1 : out + 1].tolist() for row, (_, out) in zip(made, batch, strict=True)]
        return answers


def check_seq2seq(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Output tokens per second, alternating; the greedy answers of both engines are compared first."""
    rows: list[Row] = []
    for name, make in (TINY if scale.w1_model == "tiny" else FULL).items():
        ways = ("softs", "prefixes", "bare", "as long", "padded")
        if any(len(book.series(f"seq2seq/{name}/{way}")) < scale.num_mixing_pairs for way in ways):
            _measure(Contenders(name, make, scale, root), name, scale, book)
        rate = {way: book.series(f"seq2seq/{name}/{way}")[: scale.num_mixing_pairs] for way in ways}
        rows.append(
            Row(
                f"seq2seq, {name}: greedy tokens equal to transformers'",
                "",
                f"{book.fact(f'seq2seq/{name}/equal'):.2%}",
            )
        )
        for what, ours, theirs, target in (
            (f"{NUM_PROMPTS} soft prompts mixed / no prompts, sources shorter by them", "softs", "bare", None),
            (f"{NUM_PROMPTS} soft prompts mixed / no prompts, sources as long", "softs", "as long", MIXING_TARGET),
            (f"{NUM_PROMPTS} prefixes of the decoder mixed / no prompts", "prefixes", "bare", MIXING_TARGET),
            ("continuous batching / transformers' generate, static padded", "bare", "padded", PADDED_TARGET),
        ):
            ratio = paired_ratio(rate[ours], rate[theirs])
            shown = (
                f"{ratio:.2f} x ({statistics.median(rate[ours]):.1f} : {statistics.median(rate[theirs]):.1f} tokens/s)"
            )
            is_met = None if target is None else ratio >= target
            rows.append(Row(f"seq2seq, {name}: {what}", "" if target is None else f">= {target} x", shown, is_met))
    return rows


def _measure(contenders: Contenders, name: str, scale: Scale, book: Book) -> None:
    asked = contenders.requests(seed=1000)
    pairs = zip(contenders.ours(asked), contenders.padded(asked), strict=True)
    equal = [a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]
    book.note(f"seq2seq/{name}/equal", statistics.mean(equal))
    contenders.ours(asked, contenders.softs)
    contenders.ours(asked, contenders.prefixes)
    extra = scale.virtual_tokens
    ways: dict[str, Callable[[int], list[list[int]]]] = {
        "softs": lambda seed: contenders.ours(contenders.requests(seed), contenders.softs),
        "prefixes": lambda seed: contenders.ours(contenders.requests(seed), contenders.prefixes),
        "bare": lambda seed: contenders.ours(contenders.requests(seed)),
        "as long": lambda seed: contenders.ours(contenders.requests(seed, extra)),
        "padded": lambda seed: contenders.padded(contenders.requests(seed)),
    }
    for number in range(scale.num_mixing_pairs):
        for way, answer in ways.items():
            if len(book.series(f"seq2seq/{name}/{way}")) <= number:
                began = time.perf_counter()
                answers = answer(number)
                book.add(f"seq2seq/{name}/{way}", [sum(map(len, answers)) / (time.perf_counter() - began)])
