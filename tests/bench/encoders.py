"""Encoders: many texts, each under its own soft prompt and head, against PEFT; ragged texts against padded ones."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers as hf
from peft import PromptTuningConfig, get_peft_model
from promptd_store import PromptArtifact, encode

from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.engine.request import PoolRequest
from promptd.modeling import load_model
from tests.bench.book import Book, Row, paired_ratio
from tests.bench.peers import quiet
from tests.bench.rows import Tokens
from tests.bench.scale import Scale
from tests.family_models import ENCODERS, make_encoder_tokenizer, write_model

PEFT_TARGET, PADDED_TARGET, MIXING_TARGET = 3.0, 1.3, 0.95
VIRTUAL_TOKENS = 16
LENGTHS = {"short": (4, 16), "ragged": (16, 128)}
"""Text tokens, uniform."""


def _minilm() -> hf.BertForSequenceClassification:
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_labels=4, initializer_range=0.05))  # type: ignore[arg-type]


class Contenders:
    """All ways over the same weights."""

    def __init__(self, scale: Scale, root: Path) -> None:
        make, folder = (
            (ENCODERS["bert"], root / "tiny-bert") if scale.w1_model == "tiny" else (_minilm, root / "minilm")
        )
        if not (folder / "tokenizer.json").exists():
            with quiet():
                write_model(make, make_encoder_tokenizer(), folder)
        model = load_model(folder)
        self.vocab_size, self._count = model.spec.vocab_size, scale.num_requests
        self.longest = model.spec.max_model_len - VIRTUAL_TOKENS
        config = EngineConfig(
            max_num_seqs=self._count, max_num_batched_tokens=8192, kv_cache_bytes=1 << 20, prompt_cache_bytes=1 << 20
        )
        self._engine = Engine(model, config)
        generator = torch.Generator().manual_seed(1)
        shape = (VIRTUAL_TOKENS, model.spec.hidden_size)
        tensors = [torch.randn(shape, generator=generator) * model.embedding_std for _ in range(self._count)]
        self._prompts = [encode("soft", tensor) for tensor in tensors]
        with quiet():
            self._plain = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
            base = hf.AutoModelForSequenceClassification.from_pretrained(folder)
            tuning = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL_TOKENS)
            self._peft = get_peft_model(base, tuning, adapter_name="p0")  # type: ignore[arg-type]
            for number in range(1, self._count):
                self._peft.add_adapter(f"p{number}", tuning)
        for number, tensor in enumerate(tensors):
            self._peft.prompt_encoder[f"p{number}"].embedding.weight.data.copy_(tensor)
        self._peft.eval()

    def texts(self, lengths: tuple[int, int], seed: int, extra: int = 0) -> list[Tokens]:
        """Ragged texts; the same lengths for the same seed, `extra` tokens longer."""
        rng = random.Random(seed)
        counts = [rng.randint(*lengths) + extra for _ in range(self._count)]
        return [tuple(rng.randrange(1, self.vocab_size) for _ in range(count)) for count in counts]

    def ours(self, texts: Sequence[Tokens], *, is_bare: bool = False) -> list[list[float]]:
        """Mixed batches, a prompt each or none."""
        chains: list[tuple[PromptArtifact, ...]] = [() if is_bare else (prompt,) for prompt in self._prompts]
        for number, (text, chain) in enumerate(zip(texts, chains, strict=True)):
            self._engine.add_request(PoolRequest(str(number), text, "classes", chain))
        found = {}
        while self._engine.has_work:
            found |= {output.request_id: output for output in self._engine.step()}
        return [list(found[str(number)].values) for number in range(len(texts))]  # type: ignore[union-attr]

    @torch.no_grad()
    def peft(self, texts: Sequence[Tokens]) -> list[list[float]]:
        """`set_adapter`, then one row, for every text."""
        logits = []
        for number, text in enumerate(texts):
            self._peft.set_adapter(f"p{number}")
            ids = torch.tensor([text])
            logits.append(self._peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].tolist())
        return logits

    @torch.no_grad()
    def padded(self, texts: Sequence[Tokens]) -> list[list[float]]:
        """Transformers' own batch without prompts, padded to its longest text."""
        tensors = [torch.tensor(text) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(text) for text in texts]).unsqueeze(1)
        return self._plain(input_ids=ids, attention_mask=mask.long()).logits.tolist()  # type: ignore[no-any-return]


def check_encoders(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Class scores of texts per second, alternating; the answers of all ways are compared first."""
    contenders = Contenders(scale, root)
    rows: list[Row] = []
    for name, (least, most) in LENGTHS.items():
        lengths = (least, min(most, contenders.longest))
        texts = contenders.texts(lengths, seed=1000)
        for ours, theirs in (
            (contenders.ours(texts), contenders.peft(texts)),
            (contenders.ours(texts, is_bare=True), contenders.padded(texts)),
        ):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=2e-3)
        ways: dict[str, Callable[[int], object]] = {
            "mixed": lambda seed, lengths=lengths: contenders.ours(contenders.texts(lengths, seed)),  # type: ignore[misc]
            "PEFT": lambda seed, lengths=lengths: contenders.peft(contenders.texts(lengths, seed)),  # type: ignore[misc]
            "bare": lambda seed, lengths=lengths: contenders.ours(contenders.texts(lengths, seed), is_bare=True),  # type: ignore[misc]
            "padded": lambda seed, lengths=lengths: contenders.padded(contenders.texts(lengths, seed)),  # type: ignore[misc]
            "as long": lambda seed, lengths=lengths: contenders.ours(  # type: ignore[misc]
                contenders.texts(lengths, seed, VIRTUAL_TOKENS), is_bare=True
            ),
        }
        for number in range(len(book.series(f"encoders/{name}/as long")), scale.num_mixing_pairs):
            for way, run in ways.items():
                began = time.perf_counter()
                run(number)
                book.add(f"encoders/{name}/{way}", [scale.num_requests / (time.perf_counter() - began)])
        rate = {way: book.series(f"encoders/{name}/{way}") for way in ways}
        for what, ours_name, theirs_name, target in (
            (f"{scale.num_requests} prompts mixed / PEFT, one at a time", "mixed", "PEFT", PEFT_TARGET),
            ("no prompts / transformers, padded", "bare", "padded", PADDED_TARGET),
            ("mixed / no prompts, rows as long", "mixed", "as long", MIXING_TARGET),
        ):
            ratio = paired_ratio(rate[ours_name], rate[theirs_name])
            check = f"encoders, {name} texts of {lengths[0]} to {lengths[1]}: {what}"
            rows.append(Row(check, f">= {target} x", f"{ratio:.2f} x", ratio >= target))
    return rows
