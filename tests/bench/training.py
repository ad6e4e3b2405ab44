"""Training: a step against PEFT's, many jobs in one pass against one after another, and jobs beside requests."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from promptd_store.passing_thread import in_passing_thread

from promptd.engine.async_engine import AsyncEngine
from promptd.engine.config import EngineConfig
from promptd.engine.engine import Engine
from promptd.modeling import FrozenModel, load_model
from promptd.training import (
    Example,
    MethodConfig,
    Progress,
    PromptTuningConfig,
    ResidualConfig,
    TaskFormat,
    Trainer,
    TrainingConfig,
    TrainingJob,
    TrainingLoop,
    Watcher,
    example_of,
)
from tests.bench.book import Book, Row, paired_ratio
from tests.bench.models import folder_of
from tests.bench.peers import PeftTraining, plain_model
from tests.bench.rows import fresh_tokens, request
from tests.bench.scale import Scale

STEP_TARGET, IDLE_TARGET, LOADED_TARGET = 1.0, 0.9, 0.3
MANY_TARGETS = {"demo": 3.0, "gpt2-small": 2.0}
VIRTUAL_TOKENS = 20
ENDLESS = 10**9
_ids = itertools.count()


def rows_of(model: FrozenModel, count: int, longest: int, seed: int) -> list[Example]:
    """Make rows of 8 to `longest` tokens of text and completion together."""
    rng = random.Random(seed)
    examples = []
    for line in range(count):
        wanted, words = rng.randint(8, longest), ""
        while len(model.encode(words + "ab", add_special_tokens=False)) < wanted - 3:
            words += rng.choice("abcdefgh ")
        examples.append(example_of(line, {"prompt": words, "completion": rng.choice("uvwxyz") + "."}))
    return examples


def job_of(
    model: FrozenModel, method: MethodConfig, rows: Sequence[Example], batch_size: int, seed: int = 0
) -> TrainingJob:
    """A job that never ends and never evaluates."""
    config = TrainingConfig(method, num_steps=ENDLESS, batch_size=batch_size, num_evaluations=1, seed=seed)
    return TrainingJob(model, config, TaskFormat(append_eos=False), rows, list(rows)[:2] * 2)


def stepper(model: FrozenModel, jobs: Sequence[TrainingJob]) -> Callable[[int], None]:
    """Return what takes so many steps of every job, all in shared passes."""
    trainer, taken = Trainer(model), [0] * len(jobs)

    def count(at: int) -> Callable[[Progress], None]:
        def stepped(progress: Progress) -> None:
            taken[at] = progress.step

        return stepped

    for at, job in enumerate(jobs):
        trainer.add(str(at), job, Watcher(count(at)))

    def run(num_steps: int) -> None:
        goal = [steps + num_steps for steps in taken]
        while any(steps < wanted for steps, wanted in zip(taken, goal, strict=True)):
            if ended := trainer.run_pass():
                raise RuntimeError(f"a job ended: {ended}")

    return run


def seconds_of(works: Sequence[Callable[[int], None]], num_steps: int) -> float:
    """Return the seconds of one step, of all of these one after another."""
    began = time.perf_counter()
    for work in works:
        work(num_steps)
    return (time.perf_counter() - began) / num_steps


def check_step(scale: Scale, book: Book, root: Path) -> list[Row]:
    """One job's prompt-tuning step, packed, against PEFT's over padded batches of the same rows."""
    rows = []
    for name in scale.latency_models:
        key = f"train_step/{name}"
        missing = scale.num_rounds - len(book.series(f"{key}/ours"))
        if missing > 0:
            model = load_model(folder_of(name, root))
            examples = rows_of(model, scale.train_batch * 4, scale.train_longest, 0)
            method = PromptTuningConfig(VIRTUAL_TOKENS)
            ours = stepper(model, [job_of(model, method, examples, scale.train_batch)])
            peer = PeftTraining(plain_model(folder_of(name, root)), model, examples, scale.train_batch, VIRTUAL_TOKENS)
            ours(1), peer.run(1)
            for _ in range(missing):
                book.add(f"{key}/ours", [seconds_of([ours], scale.train_steps)])
                book.add(f"{key}/peft", [seconds_of([peer.run], scale.train_steps)])
        mine, theirs = book.series(f"{key}/ours"), book.series(f"{key}/peft")
        ratio = paired_ratio(theirs, mine)
        shown = (
            f"{ratio:.2f} x as fast ({1e3 * statistics.median(mine):.0f} : {1e3 * statistics.median(theirs):.0f} ms)"
        )
        rows.append(
            Row(f"training step of one job : PEFT, {name}", f">= {STEP_TARGET:g} x", shown, ratio >= STEP_TARGET)
        )
    return rows


def check_many(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Personalization jobs of one and of four short rows a step, together against one after another."""
    rows = []
    for name, batch in itertools.product(scale.latency_models, (1, 4)):
        key = f"many_jobs/{name}/{batch}"
        missing = scale.num_rounds - len(book.series(f"{key}/together"))
        if missing > 0:
            model = load_model(folder_of(name, root))
            examples = [rows_of(model, 4 * batch, 24, seed) for seed in range(scale.num_jobs)]

            def jobs(model=model, examples=examples, batch=batch) -> list[TrainingJob]:
                return [job_of(model, ResidualConfig(10), own, batch, seed) for seed, own in enumerate(examples)]

            together, alone = stepper(model, jobs()), [stepper(model, [job]) for job in jobs()]
            for step in (together, *alone):
                step(1)
            for _ in range(missing):
                book.add(f"{key}/together", [seconds_of([together], scale.job_steps)])
                book.add(f"{key}/alone", [seconds_of(alone, scale.job_steps)])
        ratio = paired_ratio(book.series(f"{key}/alone"), book.series(f"{key}/together"))
        target = MANY_TARGETS.get(name) if batch == 1 else None
        label = f"{scale.num_jobs} jobs, {batch} row{'s' if batch > 1 else ''} a step: together : one by one, {name}"
        rows.append(
            Row(label, f">= {target:g} x" if target else "", f"{ratio:.2f} x", ratio >= target if target else None)
        )
    return rows


def check_inline(scale: Scale, book: Book, root: Path) -> list[Row]:
    """Training in the engine's spare time: its speed idle and at half load, and what requests notice."""
    rows = []
    for name in scale.latency_models:
        key = f"inline/{name}"
        if book.fact(key) is None:
            book.note(key, asyncio.run(_inline(scale, folder_of(name, root))))
        fact = book.fact(key)
        idle, loaded = fact["idle"] / fact["offline"], fact["loaded"] / fact["offline"]
        base, beside = fact["itl_p99_ms"], fact["itl_p99_training_ms"]
        limit = max(1.5 * base, base + 20)
        is_target = name == scale.latency_models[0]
        speed = f"{fact['loaded']:.0f} : {fact['offline']:.0f} tokens/s"
        rows += [
            Row(
                f"training in an idle server : offline, {name}",
                f">= {IDLE_TARGET:.0%}",
                f"{idle:.0%}",
                idle >= IDLE_TARGET,
            ),
            Row(
                f"training at half load : offline, {name}",
                f">= {LOADED_TARGET:.0%}" if is_target else "",
                f"{loaded:.0%} ({speed})",
                loaded >= LOADED_TARGET if is_target else None,
            ),
            Row(
                f"p99 between tokens at half load with training, {name}",
                f"<= {limit:.0f} ms" if is_target else "",
                f"{beside:.1f} ms (without: {base:.1f} ms)",
                beside <= limit if is_target else None,
            ),
        ]
    return rows


class Counted(TrainingLoop):
    """A loop with one endless job whose tokens are counted."""

    def __init__(self, model: FrozenModel, scale: Scale) -> None:
        super().__init__(model)
        self.num_tokens = 0
        examples = rows_of(model, 4 * scale.train_batch, scale.train_longest, 0)
        self._job = job_of(model, ResidualConfig(VIRTUAL_TOKENS), examples, scale.train_batch)

    def start(self) -> None:
        """Put the job in."""
        self.add("job", self._job, Watcher(self._count), lambda outcome: None)

    def run_for(self, seconds: float) -> float:
        """Train with nothing else to do; return tokens/s."""
        self.start()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self.run()
        return self.num_tokens / seconds

    def _count(self, progress: Progress) -> None:
        self.num_tokens += progress.num_tokens


async def _inline(scale: Scale, folder: Path) -> dict[str, float]:
    model = load_model(folder)
    offline = in_passing_thread(lambda: Counted(model, scale).run_for(scale.inline_seconds))
    loop = in_passing_thread(Counted, model, scale)
    engine = AsyncEngine(Engine(model, EngineConfig(max_num_seqs=16, enable_prefix_caching=False)), loop)
    engine.start()
    try:
        rate = scale.num_requests / await _saturate(engine, scale)
        gaps = await _poisson(engine, scale, rate / 2)
        loop.start()
        before = loop.num_tokens
        await asyncio.sleep(scale.inline_seconds)
        idle, before = loop.num_tokens - before, loop.num_tokens
        began = time.perf_counter()
        beside = await _poisson(engine, scale, rate / 2)
        loaded = (loop.num_tokens - before) / (time.perf_counter() - began)
    finally:
        loop.remove("job")
        await engine.shutdown()
    return {
        "offline": offline,
        "idle": idle / scale.inline_seconds,
        "loaded": loaded,
        "requests_per_second": rate,
        "itl_p99_ms": 1e3 * _percentile(gaps, 0.99),
        "itl_p99_training_ms": 1e3 * _percentile(beside, 0.99),
        "itl_p50_ms": 1e3 * statistics.median(gaps),
        "itl_p50_training_ms": 1e3 * statistics.median(beside),
    }


async def _answer(engine: AsyncEngine, scale: Scale) -> list[float]:
    """Send one request; return the seconds between its tokens."""
    text = fresh_tokens(scale.input_tokens, engine.engine.model.spec.vocab_size)
    times = [time.perf_counter() async for _ in engine.submit(request(text, scale.output_tokens))]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


async def _saturate(engine: AsyncEngine, scale: Scale) -> float:
    """Return the seconds that all requests take at once."""
    await _answer(engine, scale)
    began = time.perf_counter()
    await asyncio.gather(*(_answer(engine, scale) for _ in range(scale.num_requests)))
    return time.perf_counter() - began


async def _poisson(engine: AsyncEngine, scale: Scale, rate: float) -> list[float]:
    """Send requests at random moments for the whole time; return all gaps between tokens."""
    rng = random.Random(0)
    asked: list[asyncio.Task[list[float]]] = []
    until = time.perf_counter() + 2 * scale.inline_seconds
    while time.perf_counter() < until:
        await asyncio.sleep(rng.expovariate(rate))
        asked.append(asyncio.create_task(_answer(engine, scale)))
    return [gap for gaps in await asyncio.gather(*asked) for gap in gaps]


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
