"""What a prompt adds to the time to the first token: resident, and on its first use from the store."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from pathlib import Path

from promptd_store import EmbeddedStore, PromptCatalog

from tests.bench.book import Book, Row
from tests.bench.models import folder_of, frozen
from tests.bench.rows import first_token_seconds, fresh_tokens, make_engine, request, soft_prompts
from tests.bench.scale import Scale

TEXT_TOKENS = 32
RESIDENT_TARGET_MS, FIRST_USE_TARGET_MS = 1.0, 5.0
_TENANT = "bench"


def check_resident(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Time to first token with a resident prompt less without one, in alternating pairs."""
    rows = []
    for number, name in enumerate(scale.latency_models):
        key = f"resident/{name}"
        missing = scale.num_latency_pairs - len(book.series(f"{key}/with_ms"))
        if missing > 0:
            model = frozen(folder_of(name, root))
            engine = make_engine(model, text_tokens=4096, prompt_tokens=4 * scale.virtual_tokens)
            (prompt,) = soft_prompts(1, scale.virtual_tokens, model.spec.hidden_size)

            def one(*prompts: object, engine=engine, vocab_size=model.spec.vocab_size) -> float:
                return 1e3 * first_token_seconds(engine, request(fresh_tokens(TEXT_TOKENS, vocab_size), 1, *prompts))

            for _ in range(5):
                one(prompt), one()
            pairs = []
            for at in range(missing):
                first, second = ((prompt,), ()) if at % 2 else ((), (prompt,))
                times = {first: one(*first), second: one(*second)}
                pairs.append((times[(prompt,)], times[()]))
            book.add(f"{key}/with_ms", [mine for mine, _ in pairs])
            book.add(f"{key}/without_ms", [bare for _, bare in pairs])
        mine, bare = book.series(f"{key}/with_ms"), book.series(f"{key}/without_ms")
        added = statistics.median(a - b for a, b in zip(mine, bare, strict=True))
        shown = f"{added:+.2f} ms ({statistics.median(mine):.2f} : {statistics.median(bare):.2f}, {len(mine)} pairs)"
        is_target = number == 0  # stated for the embedded model; others are shown beside it
        rows.append(
            Row(
                f"resident prompt's added time to first token, {name}",
                f"<= {RESIDENT_TARGET_MS:g} ms" if is_target else "",
                shown,
                added <= RESIDENT_TARGET_MS if is_target else None,
            )
        )
    return rows


def check_first_use(scale: Scale, book: Book, root: Path) -> list[Row]:
    """First use of a stored prompt less its second use, against a prefill of as many tokens."""
    rows = []
    for name in scale.latency_models:
        key = f"first_use/{name}"
        if len(book.series(f"{key}/added_ms")) < scale.num_first_uses:
            asyncio.run(_first_uses(scale, book, key, root, name))
        added = statistics.median(book.series(f"{key}/added_ms"))
        prefill = statistics.median(book.series(f"{key}/prefill_ms"))
        limit = prefill + FIRST_USE_TARGET_MS
        rows.append(
            Row(
                f"first use of a stored {scale.virtual_tokens}-token prompt, {name}",
                f"<= a prefill + {FIRST_USE_TARGET_MS:g} ms",
                f"{added:+.1f} ms, prefill {prefill:.1f} ms",
                added <= limit,
            )
        )
    return rows


async def _first_uses(scale: Scale, book: Book, key: str, root: Path, name: str) -> None:
    """Read from disk each time: nothing of the prompt is in the host's cache or on the device."""
    model = frozen(folder_of(name, root))
    count, vocab_size = scale.num_first_uses, model.spec.vocab_size
    engine = make_engine(model, text_tokens=4096, prompt_tokens=(count + 2) * scale.virtual_tokens)

    def seconds(num_tokens: int, *prompts: object) -> float:
        return first_token_seconds(engine, request(fresh_tokens(num_tokens, vocab_size), 1, *prompts))

    with tempfile.TemporaryDirectory() as folder:
        store = EmbeddedStore(Path(folder))
        catalog = PromptCatalog(store, model.spec)
        for number, prompt in enumerate(soft_prompts(count + 1, scale.virtual_tokens, model.spec.hidden_size)):
            await catalog.publish(_TENANT, f"p{number}", prompt.content)
        for number in range(count + 1):
            cold = PromptCatalog(store, model.spec)
            used = []
            for _ in range(2):
                began = asyncio.get_running_loop().time()
                artifact = await cold.load(await cold.resolve(_TENANT, f"p{number}"))
                loaded = asyncio.get_running_loop().time() - began
                used.append(loaded + seconds(TEXT_TOKENS, artifact))
            prefill = seconds(scale.virtual_tokens)
            if number:  # the first warms up
                book.add(f"{key}/added_ms", [1e3 * (used[0] - used[1])])
                book.add(f"{key}/prefill_ms", [1e3 * prefill])
        await store.close()
