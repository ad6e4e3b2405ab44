"""How far a step is from its matrix products alone: one of single tokens, and one that reads texts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from promptd.modeling import FrozenModel
from promptd.modeling.frozen_linear import FrozenLinear
from promptd.modeling.last_layer import LastLinear
from promptd.modeling.packed_linear import PackedLinear, can_pack
from tests.bench.book import Book, Row
from tests.bench.models import folder_of, frozen
from tests.bench.rows import fresh_tokens, make_engine, request, run, soft_prompts
from tests.bench.scale import Scale

DECODE_TARGET, PREFILL_TARGET = 1.3, 1.25
_REPEATS = 5
Product = Callable[[torch.Tensor], torch.Tensor]


class Products:
    """A step's products over random rows, one after another as in a step, by several kernels."""

    def __init__(self, model: FrozenModel) -> None:
        layers = [layer for layer in model.hf.modules() if isinstance(layer, FrozenLinear)]
        behind = {wrapped.linear for wrapped in model.hf.modules() if isinstance(wrapped, LastLinear)}
        self._inputs = [layer.weight.shape[1] for layer in layers]
        self._is_last = [layer in behind or layer.weight.shape[0] == model.spec.vocab_size for layer in layers]
        self._kernels: dict[str, Sequence[Product]] = {"promptd": [layer.product for layer in layers]}
        if can_pack(model.dtype):
            packed = [PackedLinear(torch.cat(list(layer.dense())), layer.bias, pack=True) for layer in layers]
            self._kernels["oneDNN"] = [layer.product for layer in packed]

    @torch.no_grad()
    def seconds(self, num_rows: int, num_logits: int) -> float:
        """Return the seconds of all, each by its fastest kernel; behind the last attention are fewer rows."""
        counts = [num_logits if is_last else num_rows for is_last in self._is_last]
        rows = {size: torch.randn(size) for size in set(zip(counts, self._inputs, strict=True))}
        times: dict[str, list[list[float]]] = {name: [] for name in self._kernels}
        for _ in range(_REPEATS):
            for name, products in self._kernels.items():
                times[name].append([])
                for product, size in zip(products, zip(counts, self._inputs, strict=True), strict=True):
                    began = time.perf_counter()
                    product(rows[size])
                    times[name][-1].append(time.perf_counter() - began)
        medians = [[statistics.median(layer) for layer in zip(*runs, strict=True)] for runs in times.values()]
        return sum(map(min, zip(*medians, strict=True)))


def check_products(scale: Scale, book: Book, root: Path) -> list[Row]:
    """In rounds: a step of rows under a soft prompt each, a step that reads texts, and the products of both."""
    key = f"products/{scale.w1_model}"
    missing = scale.num_product_rounds - len(book.series(f"{key}/read_products_ms"))
    if missing > 0:
        model = frozen(folder_of(scale.w1_model, root))
        products, rows = Products(model), scale.max_num_seqs
        num_texts = max(1, scale.prefill_tokens // scale.input_tokens)
        room = max(rows, num_texts) * (scale.input_tokens + scale.output_tokens + 16)
        engine = make_engine(
            model,
            max_num_seqs=max(rows, num_texts),
            text_tokens=3 * room,
            prompt_tokens=2 * rows * scale.virtual_tokens,
        )
        prompts = soft_prompts(rows, scale.virtual_tokens, model.spec.hidden_size)

        def text() -> tuple[int, ...]:
            return fresh_tokens(scale.input_tokens, model.spec.vocab_size)

        def write() -> float:
            asked = [request(text(), scale.output_tokens, prompt) for prompt in prompts]
            return statistics.median(seconds for seconds, _ in run(engine, asked, full_rows=rows).decode_steps)

        def read() -> float:
            return run(engine, [request(text(), 1) for _ in range(num_texts)]).seconds

        write(), read()
        for _ in range(missing):
            for name, step, count, num_logits in (
                ("write", write, rows, rows),
                ("read", read, num_texts * scale.input_tokens, num_texts),
            ):
                alone = products.seconds(count, num_logits)
                book.add(f"{key}/{name}_step_ms", [1e3 * step()])
                book.add(f"{key}/{name}_products_ms", [1e3 * alone])
    return [
        _row(book, f"{key}/write", f"a step of {scale.max_num_seqs} rows", DECODE_TARGET),
        _row(book, f"{key}/read", f"reading {scale.prefill_tokens:,} tokens", PREFILL_TARGET),
    ]


def _row(book: Book, key: str, what: str, target: float) -> Row:
    steps, products = (book.series(f"{key}_{name}_ms") for name in ("step", "products"))
    ratio = statistics.median(step / alone for step, alone in zip(steps, products, strict=True))
    shown = f"{ratio:.2f} x ({statistics.median(steps):.1f} : {statistics.median(products):.1f} ms)"
    name = f"{what} : its matrix products alone, {key.split('/')[1]}"
    return Row(name, f"<= {target:g} x", shown, ratio <= target)
