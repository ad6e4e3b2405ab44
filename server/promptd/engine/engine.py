"""The engine: `step()` takes in, schedules, runs the model, samples, hands out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection

import torch

from promptd.engine.admission import admit
from promptd.engine.block_manager import BlockManager
from promptd.engine.config import EngineConfig
from promptd.engine.deadlines import overdue
from promptd.engine.extents import ExtentAllocator
from promptd.engine.output import Emitter, Picked
from promptd.engine.prompt_cache import PromptCache
from promptd.engine.request import Output, Request
from promptd.engine.runner import Answers, Made, Runner
from promptd.engine.schedule import Schedule
from promptd.engine.scheduler import Scheduler
from promptd.engine.sequence import Sequence, SequenceStatus
from promptd.engine.stats import EngineCounters, EngineStats
from promptd.errors import (
    InvalidRequestError,
    NotFoundError,
    NumericalError,
    OverloadedError,
    PromptdError,
    RateLimitError,
)
from promptd.modeling import FrozenModel


class Engine:
    """Many prompts, one packed batch. Used by one thread at a time."""

    def __init__(
        self, model: FrozenModel, config: EngineConfig | None = None, *, runs_ahead: bool | None = None
    ) -> None:
        """`runs_ahead` overrides whether a step is begun before the one before has landed: see `step`."""
        self.model = model
        model.use_device()
        self.config = config or EngineConfig()
        size, slot_bytes = self.config.block_size, model.bytes_per_slot
        num_blocks = max(1, self.config.kv_cache_bytes // (slot_bytes * size)) if model.stores_text else 1
        num_prompt_slots = self.config.prompt_cache_bytes // slot_bytes
        self.max_model_len = min(self.config.max_model_len or model.spec.max_model_len, model.spec.max_model_len)
        self.pool = model.make_pool(num_blocks * size + num_prompt_slots)
        self.blocks = BlockManager(num_blocks, size)
        self.prompts = PromptCache(self.pool, ExtentAllocator(num_blocks * size, num_prompt_slots))
        on_gpu = model.device.type == "cuda"
        self.scheduler = Scheduler(self.config, self.blocks, self.prompts, on_gpu=on_gpu)
        self.counters = EngineCounters()
        self._runner = Runner(model, self.pool, size, strict=self.config.strict)
        self._emitter = Emitter(model, self.counters)
        self._sequences: dict[str, Sequence] = {}
        self._displaced: list[Output] = []
        self._runs_ahead = model.runs_ahead if runs_ahead is None else runs_ahead
        self._in_flight: Picked | None = None
        self._last_step = (0.0, 0)

    @property
    def has_work(self) -> bool:
        """Whether `step()` has anything to do."""
        return bool(self._sequences or self._displaced or self._in_flight)

    def seconds_to_gather(self) -> float:
        """How long requests are to wait for others now: 0 when one runs, the batch is full, the first waited enough."""
        waiting = self.scheduler.waiting
        if not waiting or self.scheduler.running or len(waiting) >= self.config.max_num_seqs:
            return 0.0
        return max(0.0, min(seq.arrived for seq in waiting) + self.config.batch_wait_seconds - time.monotonic())

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises a typed error at once where it can never run, or where the queue is full."""
        self.enqueue(self.prepare(request))

    def prepare(self, request: Request, *, num_ahead: int = 0) -> Sequence:
        """Check a request and the room in the queue; touches nothing, so any thread may call it."""
        waiting, limit = self.scheduler.waiting, self.config.max_queue
        # A full queue still has room for a share that has less than its part of it: the longest line gives way.
        own = waiting.num_waiting(request.share.key) + num_ahead
        num_shares = waiting.num_busy + (not waiting.is_busy(request.share.key))
        if len(waiting) + num_ahead >= limit and own >= limit // num_shares:
            raise _queue_full(len(waiting) + num_ahead)
        return admit(request, self)

    def enqueue(self, seq: Sequence) -> None:
        """Take in a prepared request."""
        request_id = seq.request.request_id
        if request_id in self._sequences:
            raise InvalidRequestError(f"request id {request_id!r} is running already", param="request_id")
        self._sequences[request_id] = seq
        self.scheduler.add(seq)
        if len(self.scheduler.waiting) > self.config.max_queue:
            last = self.scheduler.waiting.longest_line()
            if last is not None and last.scheduled is None:  # a row that ran already is not thrown away
                self._displaced.append(self._fail(last, _queue_full(self.config.max_queue)))

    def abort(self, request_id: str) -> None:
        """End a request without a result; unknown or finished ids are fine."""
        seq = self._sequences.pop(request_id, None)
        if seq is not None:
            self.scheduler.finish(seq)
            self.counters.requests_aborted += 1

    def erase(self, salt: str, versions: Collection[str] | None, spread: Collection[str] = ()) -> int:
        """Forget the K/V of some versions under a salt, None: all under it; of `spread` under every salt.

        Returns how many prompts were resident. Where all goes, the salt's requests end now; others that need a version
        finish, and what they need goes with the last of them.
        """
        self._displaced += self.land()
        wanted, everywhere = set(versions or ()), set(spread)

        def is_wanted(key: tuple[str, ...]) -> bool:
            is_mine = key[0] == salt and (versions is None or not wanted.isdisjoint(key[1:]))
            return is_mine or not everywhere.isdisjoint(key[1:])

        if versions is None:
            for seq in [seq for seq in self._sequences.values() if seq.request.salt == salt]:
                self._displaced.append(self._fail(seq, NotFoundError("what this request belongs to was erased")))
        blocks = self.blocks.erase(lambda root: is_wanted(root[:-1]))  # the last part is no version but a source
        size = self.config.block_size
        self.pool.clear([(block * size, size) for block in blocks])
        return self.prompts.erase(is_wanted)

    def step(self) -> list[Output]:
        """Begin one packed batch; return what a batch added to every request in it.

        That is this one, or, where the device computes while the host plans, the one before: then this one is in
        flight, its rows have places for tokens that only the device knows, and a row that has ended runs once more.
        """
        began = time.monotonic()
        outputs = [*self._displaced, *self._expire(began)]
        self._displaced.clear()
        step = self.scheduler.schedule()
        outputs += [self._fail(seq, _line_full(limit)) for seq, limit in self.scheduler.waiting.surplus()]
        if step:
            for seq in (*step.sources, *(row.seq for row in step.rows)):
                seq.reading = seq.reading or max(began, seq.scheduled or began)
            answers = self._run(step, outputs)
            self._advance(step)
            outputs += self.land()  # the step before: the device has this one to do meanwhile
            self._in_flight = self._emitter.pick(step, answers)
            if not (self._runs_ahead and self._in_flight.may_wait):
                outputs += self.land()
            self.counters.steps += 1
            self._last_step = (time.monotonic() - began, step.num_tokens)
        else:
            outputs += self.land()
        return outputs

    @property
    def _made(self) -> Made | None:
        """The tokens that only the device knows."""
        return None if self._in_flight is None else self._in_flight.made

    def _expire(self, now: float) -> list[Output]:
        late = [(seq, overdue(seq, self.config, now)) for seq in self._sequences.values()]
        return [self._fail(seq, error) for seq, error in late if error is not None]

    def _run(self, step: Schedule, outputs: list[Output]) -> Answers:
        """Run the batch; where it raises, run everything alone, so that only the guilty ones fail."""
        try:
            return self._runner.run(step, self._made)
        except Exception:  # noqa: BLE001 - whatever it was, one row caused it; the replay finds which
            self._replay_loads(step, outputs)
            return Answers(self._replay_sources(step, outputs), self._replay_rows(step, outputs))

    def _replay_loads(self, step: Schedule, outputs: list[Output]) -> None:
        for load in list(step.loads):
            if load.entry not in self.prompts.loading:
                continue  # it went with the last request that named it
            try:
                self._runner.run(Schedule(loads=[load]))
            except Exception as error:  # noqa: BLE001 - becomes a typed error of every row behind this prompt
                for seq in [seq for seq in self.scheduler.running if load.entry in seq.chain]:
                    self._drop_row(step, seq)
                    outputs.append(self._fail(seq, PromptdError(f"the prompt failed in the model: {error}")))
        step.loads = [load for load in step.loads if load.entry in self.prompts.loading]

    def _replay_sources(self, step: Schedule, outputs: list[Output]) -> list[torch.Tensor]:
        read: list[torch.Tensor] = []
        for seq in list(step.sources):
            try:
                read += self._runner.run(Schedule(sources=[seq])).read
            except Exception as error:  # noqa: BLE001 - becomes that row's typed error
                self._drop_row(step, seq)
                outputs.append(self._fail(seq, PromptdError(f"this row failed in the model: {error}")))
        return read

    def _replay_rows(self, step: Schedule, outputs: list[Output]) -> torch.Tensor:
        parts = [torch.empty(0, self.model.spec.vocab_size, device=self.model.device)]
        for row in list(step.rows):
            try:
                parts.append(self._runner.run(Schedule(rows=[row]), self._made).logits)
            except Exception as error:  # noqa: BLE001 - becomes that row's typed error
                self._drop_row(step, row.seq)
                outputs.append(self._fail(row.seq, PromptdError(f"this row failed in the model: {error}")))
        return torch.cat(parts)

    def _drop_row(self, step: Schedule, seq: Sequence) -> None:
        step.sources = [other for other in step.sources if other is not seq]
        for row in [row for row in step.rows if row.seq is seq]:
            step.rows.remove(row)
            self.blocks.release(row.candidate_blocks)

    def _advance(self, step: Schedule) -> None:
        for load in step.loads:
            load.entry.num_computed += load.num_tokens
            self.counters.virtual_tokens_computed += load.num_tokens
        self.prompts.finish_loading()
        for seq in step.sources:
            seq.is_source_read = True
        for row in step.rows:
            row.seq.num_computed += row.num_tokens
            self.blocks.release(row.candidate_blocks)

    def land(self) -> list[Output]:
        """Wait for the step that is in flight, if one is; return what it added to every request in it."""
        landing, self._in_flight = self._in_flight, None
        if landing is None:
            return []
        outputs = self._emitter.emit(landing)
        for row in landing.rows:
            if row.seq.status is SequenceStatus.RUNNING:
                self.scheduler.register_blocks(row.seq, row.start + row.num_tokens)
        for output in outputs:
            if output.is_last:
                self._end(self._sequences[output.request_id], output.error)
        return outputs

    def _fail(self, seq: Sequence, error: PromptdError) -> Output:
        self._end(seq, error)
        return self._emitter.failure(seq, error)

    def _end(self, seq: Sequence, error: PromptdError | None) -> None:
        chain = seq.chain
        if isinstance(error, NumericalError):  # K/V that may hold the fault is not kept for the next request
            self.blocks.forget(seq.blocks)
        del self._sequences[seq.request.request_id]
        self.scheduler.finish(seq)
        if error is None:
            self.counters.requests_finished += 1
            return
        self.counters.requests_failed += 1
        if isinstance(error, NumericalError):
            for entry in reversed(chain):
                self.prompts.discard(entry)

    def stats(self) -> EngineStats:
        """Read all gauges and counters."""
        cache = self.prompts
        seconds, num_tokens = self._last_step
        counters = {name: getattr(self.counters, name) for name in self.counters.__dataclass_fields__}
        return EngineStats(
            num_requests_running=len(self.scheduler.running),
            num_requests_waiting=len(self.scheduler.waiting),
            kv_cache_usage_ratio=self.blocks.num_used / self.blocks.num_blocks,
            prompt_cache_bytes=cache.num_bytes,
            prompt_cache_capacity_bytes=cache.capacity_tokens * self.pool.bytes_per_slot,
            prompts_resident=cache.num_resident,
            prompt_cache_hits=cache.stats.hits,
            prompt_cache_misses=cache.stats.misses,
            prompt_cache_evictions=cache.stats.evictions,
            preemptions=self.scheduler.num_preemptions,
            last_step_seconds=seconds,
            last_step_num_tokens=num_tokens,
            **counters,
        )

    def check_integrity(self) -> None:
        """Raise `RuntimeError` unless every pool, pin and queue agrees; for tests, after each step."""
        self.blocks.check_integrity()
        self.prompts.check_integrity()
        sequences = self._sequences.values()
        self.blocks.check_references(Counter(block for seq in sequences for block in seq.blocks + seq.source_blocks))
        self.prompts.check_pins(Counter(entry.key for seq in sequences for entry in seq.chain))
        if len(self._sequences) != len(self.scheduler.waiting) + len(self.scheduler.running):
            raise RuntimeError("a sequence is neither waiting nor running")


def _line_full(limit: int) -> RateLimitError:
    return RateLimitError(
        f"{limit} requests may wait beside those that run, and no place is left for this one",
        code="too_many_queued_requests",
        retry_after_seconds=1,
    )


def _queue_full(num_waiting: int) -> OverloadedError:
    return OverloadedError(f"{num_waiting} requests are waiting already", code="queue_full", retry_after_seconds=1)
