"""Which tokens run in the next step. Decides only; computes nothing. No torch.

Order: prompts on their way into the cache, running rows (each decode token before any prefill chunk), then
waiting rows first come first served while rows, tokens and blocks last. A source is read whole, in one step. A row
that finds no block preempts the youngest row, which later starts again from its tokens and, drawing from its own seed,
makes the same ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from promptd.engine.block_manager import BlockManager
from promptd.engine.config import EngineConfig
from promptd.engine.prompt_types import Prompts
from promptd.engine.sequence import Sequence, SequenceStatus


@dataclass(slots=True)
class ScheduledLoad:
    """Part of a prompt that becomes K/V in this step."""

    entry: Any
    start: int
    num_tokens: int


@dataclass(slots=True)
class ScheduledRow:
    """Tokens of one sequence that run in this step."""

    seq: Sequence
    start: int
    num_tokens: int
    candidate_blocks: list[int] = field(default_factory=list)

    @property
    def is_final(self) -> bool:
        """Whether the sequence's last token is among them, so that its logits are wanted."""
        return self.start + self.num_tokens == len(self.seq.token_ids)


@dataclass(slots=True)
class Schedule:
    """One step. Its sources are read first: the rows may read what they leave."""

    loads: list[ScheduledLoad] = field(default_factory=list)
    sources: list[Sequence] = field(default_factory=list)
    rows: list[ScheduledRow] = field(default_factory=list)

    def completes(self, entry: Any) -> bool:
        """Whether an element of a chain and all before it have their K/V once the loads of this step ran."""
        ends = {id(load.entry): load.start + load.num_tokens for load in self.loads}
        while entry is not None:
            if not entry.is_ready and ends.get(id(entry)) != entry.num_tokens:
                return False
            entry = entry.parent
        return True

    def __bool__(self) -> bool:
        return bool(self.loads or self.sources or self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens that run, but for candidates'."""
        parts = [load.num_tokens for load in self.loads] + [row.num_tokens for row in self.rows]
        return sum(parts) + sum(len(seq.source.token_ids) for seq in self.sources)


class Scheduler:
    """Owner of the waiting queue and of the running rows."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, prompts: Prompts) -> None:
        self.config = config
        self.blocks = blocks
        self.prompts = prompts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def schedule(self) -> Schedule:
        """Plan one step and take the blocks that it needs."""
        step = Schedule()
        preempted_before = self.num_preemptions
        decoding = [seq for seq in self.running if seq.is_decoding]
        budget = self.config.max_num_batched_tokens - len(decoding)  # decode rows never wait for prefill
        budget = self._schedule_loads(step, budget)
        for seq in decoding:
            if seq.status is SequenceStatus.RUNNING:  # not preempted by an older row meanwhile
                self._schedule_decode(step, seq)
        is_stalled = self.num_preemptions > preempted_before
        for seq in [seq for seq in self.running if not seq.is_decoding]:
            num_tokens = self._schedule_prefill(step, seq, budget)
            is_stalled |= not num_tokens  # newcomers would take what it waits for, again and again
            budget -= num_tokens
        while self.waiting and len(self.running) < self.config.max_num_seqs and budget > 0:
            if is_stalled or not self._admit(self.waiting[0]):
                break
            seq = self.waiting.popleft()
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            budget = self._schedule_loads(step, budget)
            budget -= self._schedule_prefill(step, seq, budget)
        if not step and len(self.running) > 1:  # prefilling rows hold all blocks between them
            self._preempt(max(self.running, key=lambda seq: seq.arrived))
        alive = {id(entry) for entry in self.prompts.loading}
        step.loads = [load for load in step.loads if id(load.entry) in alive]
        return step

    def _schedule_loads(self, step: Schedule, budget: int) -> int:
        """Add the loads that are not in the step yet; return what is left of the budget."""
        scheduled = {id(load.entry) for load in step.loads}
        for entry in self.prompts.loading:
            if id(entry) in scheduled or not step.completes(entry.parent):
                continue
            num_tokens = self._chunk(entry.num_tokens - entry.num_computed, budget)
            if num_tokens:
                step.loads.append(ScheduledLoad(entry, entry.num_computed, num_tokens))
                budget -= num_tokens
        return budget

    def _chunk(self, wanted: int, budget: int) -> int:
        """Tokens to run of `wanted`; strict mode cuts at fixed places whatever else is in the batch."""
        if self.config.strict:
            wanted = min(wanted, max(1, self.config.max_num_batched_tokens // 2))
            return wanted if wanted <= budget else 0
        return max(0, min(wanted, budget))

    def _schedule_decode(self, step: Schedule, seq: Sequence) -> None:
        """Add the row's one token, preempting younger rows (or itself) where it finds no block."""
        size = self.config.block_size
        if seq.num_computed == len(seq.blocks) * size:
            scheduled = {id(row.seq) for row in step.rows}
            while not self.blocks.can_allocate(1):
                others = [s for s in self.running if s is not seq and id(s) not in scheduled]
                victim = max(others, key=lambda s: s.arrived, default=seq)
                if victim.arrived <= seq.arrived:
                    self._preempt(seq)
                    return
                self._preempt(victim)
            self._grow(seq, 1)
        step.rows.append(ScheduledRow(seq, seq.num_computed, 1))

    def _schedule_prefill(self, step: Schedule, seq: Sequence, budget: int) -> int:
        """Add the row's source and a chunk of its target once its prompts are there; return the tokens they take."""
        if seq.chain and not step.completes(seq.chain[-1]):
            return 0
        num_source = self._schedule_source(step, seq, budget)
        if seq.num_source_tokens and not num_source:
            return 0
        return num_source + self._schedule_target(step, seq, budget - num_source)

    def _schedule_source(self, step: Schedule, seq: Sequence, budget: int) -> int:
        """Add the row's source where it fits; return the tokens it takes of the budget."""
        num_tokens = seq.num_source_tokens
        num_blocks = -(-seq.num_kept_tokens // self.config.block_size)
        if not num_tokens or num_tokens > budget or not self.blocks.can_allocate(num_blocks):
            return 0
        seq.source_blocks = self.blocks.allocate(num_blocks)
        step.sources.append(seq)
        return num_tokens

    def _schedule_target(self, step: Schedule, seq: Sequence, budget: int) -> int:
        """Add a chunk of the row's target; return the tokens it takes of the budget."""
        size = self.config.block_size
        num_tokens = self._chunk(seq.num_uncomputed, budget)
        extra = seq.num_candidate_tokens
        if extra and num_tokens == seq.num_uncomputed and num_tokens + extra > budget:
            num_tokens -= 1  # the last token goes with the candidates, in a step that holds them all
        room = (len(seq.blocks) + self.blocks.num_allocatable) * size - seq.num_computed
        num_tokens = min(num_tokens, room)
        if num_tokens <= 0:
            return 0
        missing = -(-(seq.num_computed + num_tokens) // size) - len(seq.blocks)
        row = ScheduledRow(seq, seq.num_computed, num_tokens)
        if not row.is_final:
            extra = 0
        if not self.blocks.can_allocate(max(0, missing) + -(-extra // size)):
            return 0
        if missing > 0:
            self._grow(seq, missing)
        if extra:
            row.candidate_blocks = self.blocks.allocate(-(-extra // size))
        step.rows.append(row)
        return num_tokens + extra

    def _grow(self, seq: Sequence, num_blocks: int) -> None:
        expected = -(-seq.num_expected_tokens // self.config.block_size) - len(seq.blocks) - num_blocks
        after = seq.blocks[-1] if seq.blocks else None
        seq.blocks += self.blocks.allocate(num_blocks, after=after, expected=max(0, expected))

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._free(seq)
        seq.num_computed = seq.num_registered_blocks = 0
        seq.is_source_read = seq.source is None
        seq.prompt_logprobs.clear()
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _admit(self, seq: Sequence) -> bool:
        """Pin the chain, reuse a cached text prefix; False where there is no room now."""
        chain = self.prompts.acquire(seq.request.salt, seq.segments)
        if chain is None:
            return False
        seq.chain = chain
        seq.prefix_node = self.blocks.root(seq.prefix_key)
        if self.config.enable_prefix_caching and not self.config.strict and not seq.wants_prompt_logprobs:
            # At least one token must run, or there would be no logits.
            seq.blocks, seq.prefix_node = self.blocks.match(seq.prefix_node, seq.token_ids[:-1])
            seq.num_computed = len(seq.blocks) * self.config.block_size
            seq.num_registered_blocks = len(seq.blocks)
            if seq.scheduled is None:  # a row that comes back finds its own blocks: those saved nobody a thing
                seq.num_cached_tokens = min(seq.num_computed, seq.num_target_tokens)
        tokens_now = seq.num_expected_tokens if self.config.strict else min(seq.num_computed + 1, len(seq.token_ids))
        needed = -(-tokens_now // self.config.block_size) - len(seq.blocks)
        if not self.blocks.can_allocate(needed):
            self._free(seq)
            seq.num_computed = seq.num_registered_blocks = 0
            return False
        if self.config.strict:  # everything at once: a strict row is never preempted
            seq.blocks += self.blocks.allocate(needed)
        return True

    def register_blocks(self, seq: Sequence) -> None:
        """Make the sequence's newly filled blocks findable by later texts."""
        if not self.config.enable_prefix_caching or self.config.strict:
            return
        size = self.config.block_size
        while (seq.num_registered_blocks + 1) * size <= seq.num_computed:
            start = seq.num_registered_blocks * size
            tokens = tuple(seq.token_ids[start : start + size])
            seq.prefix_node = self.blocks.register(seq.prefix_node, tokens, seq.blocks[seq.num_registered_blocks])
            seq.num_registered_blocks += 1

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, whatever its state; its blocks and pins are free afterwards."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
        elif seq.status is SequenceStatus.WAITING:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        self._free(seq)

    def _free(self, seq: Sequence) -> None:
        self.blocks.release(seq.blocks)
        self.blocks.release(seq.source_blocks)
        self.prompts.release(seq.chain)
        seq.blocks, seq.source_blocks, seq.chain = [], [], ()
