"""Which tokens run in the next step. Decides only; computes nothing. No torch.

Order: running rows (each decode token before any prefill chunk), then, the share with the least service first, its rows
that still read and its waiting ones, while rows, tokens and blocks last. Beside rows that write, texts are read in
smaller pieces. A row's prompts on their way into the cache come with it; a source is read whole, in one step. A row
that finds no block preempts the youngest row, which later starts again from its tokens and, drawing from its own seed,
makes the same ones. A share that has less than its part of the rows or blocks while another has more gets them at the
next step: the youngest row of the other one is preempted.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from itertools import islice

from promptd.engine.block_manager import BlockManager
from promptd.engine.config import EngineConfig
from promptd.engine.fair_queue import FairQueue
from promptd.engine.prompt_types import Prompts
from promptd.engine.schedule import Budget, Schedule, ScheduledLoad, ScheduledRow
from promptd.engine.sequence import Sequence, SequenceStatus


class Scheduler:
    """Owner of the waiting queue and of the running rows."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, prompts: Prompts, *, on_gpu: bool = False) -> None:
        self.config = config
        self._on_gpu = on_gpu
        self.blocks = blocks
        self.prompts = prompts
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        """Take in a new sequence."""
        self.waiting.open(seq)

    def schedule(self) -> Schedule:
        """Plan one step and take the blocks that it needs."""
        step = Schedule()
        self._make_way()
        preempted_before = self.num_preemptions
        decoding = [seq for seq in self.running if seq.is_decoding and not seq.is_done]
        for seq in decoding:
            if seq.status is SequenceStatus.RUNNING:  # not preempted by an older row meanwhile
                self._schedule_decode(step, seq)
        # Decode rows never wait for prefill: their tokens are set aside, also those of rows just preempted.
        num_tokens = self.config.max_num_batched_tokens - len(decoding)
        num_even = num_tokens
        if decoding and not self.config.strict:
            num_mixed = self.config.num_mixed_tokens(len(decoding), self._num_unread(), on_gpu=self._on_gpu)
            num_even = min(num_tokens, num_mixed)
        self._fill(step, Budget(num_tokens, num_even), may_admit=self.num_preemptions == preempted_before)
        if not step and len(self.running) > 1 and not any(seq.is_done for seq in self.running):
            # Rows that still read hold all blocks between them.
            self._preempt(max(self.running, key=lambda seq: seq.arrived))
        alive = {id(entry) for entry in self.prompts.loading}
        step.loads = [load for load in step.loads if id(load.entry) in alive]
        # Rows of one prompt, or of one cached text, are neighbours: it is read once.
        step.rows.sort(key=lambda row: (row.num_tokens > 1, row.seq.bank("target"), row.seq.blocks))
        return step

    def _num_unread(self) -> int:
        """Tokens of texts that rows which run, or could, have still to read."""
        reading = [seq for seq in self.running if not (seq.is_decoding or seq.is_done)]
        newcomers = islice(self.waiting, self.config.max_num_seqs - len(self.running))
        return sum(seq.num_uncomputed for seq in [*reading, *newcomers])

    def _make_way(self) -> None:
        """Preempt rows of shares that have more than their part, for waiting ones that have less and were served less.

        A share gives only what is above its part, and takes only up to it, so that no row is handed to and fro.
        """
        if self.waiting.num_busy < 2 or not len(self.waiting) or self.config.strict:  # a strict row is never preempted
            return
        row_parts = self.waiting.parts(self.config.max_num_seqs)
        block_parts = self.waiting.parts(self.blocks.num_blocks)
        size = self.config.block_size
        for key in self.waiting.waiting_shares():
            held = Counter[str]()
            for seq in self.running:
                held[seq.request.share.key] += len(seq.blocks) + len(seq.source_blocks)
            first, num_rows = self.waiting.first(key), self.waiting.num_running(key)
            num_blocks = first.num_blocks(size) if first is not None else 0
            while len(self.running) >= self.config.max_num_seqs and num_rows < row_parts[key]:
                excess = {one: self.waiting.num_running(one) - part for one, part in row_parts.items()}
                if not self._preempt_from(excess, key):
                    break
                num_rows += 1  # the row that it will get
                if num_rows - self.waiting.num_running(key) >= self.waiting.num_waiting(key):
                    break
            while not self.blocks.can_allocate(num_blocks) and held[key] + num_blocks <= block_parts[key]:
                victim = self._preempt_from({one: held[one] - part for one, part in block_parts.items()}, key)
                if victim is None:
                    break
                held[victim.request.share.key] -= victim.num_blocks(size)

    def _preempt_from(self, excess: dict[str, int], wanting: str) -> Sequence | None:
        """Preempt the youngest row of the share that has most above its part; None where no share that may give has."""
        service = self.waiting.service(wanting)
        givers = [key for key, above in excess.items() if above > 0 and self.waiting.service(key) >= service]
        giver = max(givers, key=excess.__getitem__, default=None)
        rows = [seq for seq in self.running if seq.request.share.key == giver]
        if not rows:
            return None
        victim = max(rows, key=lambda seq: seq.arrived)
        self._preempt(victim)
        return victim

    def _fill(self, step: Schedule, budget: Budget, *, may_admit: bool) -> None:
        """Give the step's tokens away: again and again to the share with the least service."""
        reading: dict[str, deque[Sequence]] = {}
        for seq in self.running:
            if not (seq.is_decoding or seq.is_done):
                reading.setdefault(seq.request.share.key, deque()).append(seq)
        while budget.num_even > 0:
            may_admit = may_admit and len(self.running) < self.config.max_num_seqs
            key = self.waiting.least_served([*reading, *(self.waiting.waiting_shares() if may_admit else ())])
            if key is None:
                return
            if key in reading:
                num_tokens = self._schedule_prompt_and_text(step, reading[key].popleft(), budget)
                may_admit = may_admit and num_tokens > 0  # newcomers would take what it waits for, again and again
                if not reading[key]:
                    del reading[key]
            else:
                newcomer = self._start_first(key)
                may_admit = newcomer is not None
                if newcomer is not None:
                    self._schedule_prompt_and_text(step, newcomer, budget)

    def _start_first(self, key: str) -> Sequence | None:
        """Let a share's next waiting row run; None where there is no room for it now."""
        seq = self.waiting.first(key)
        if seq is None or not self._admit(seq):
            return None
        self.waiting.start(seq)
        seq.status = SequenceStatus.RUNNING
        seq.scheduled = seq.scheduled or time.monotonic()
        self.running.append(seq)
        return seq

    def _schedule_prompt_and_text(self, step: Schedule, seq: Sequence, budget: Budget) -> int:
        """Add what a row still has to read: its prompts first. Return the tokens it takes of the budget."""
        before = budget.num_tokens
        self._schedule_loads(step, seq, budget)
        self._schedule_prefill(step, seq, budget)
        num_taken = before - budget.num_tokens
        self.waiting.charge(seq, num_read=num_taken)
        return num_taken

    def _schedule_loads(self, step: Schedule, seq: Sequence, budget: Budget) -> None:
        """Add the prompts of a row's chain that no row before it has added."""
        scheduled = {id(load.entry) for load in step.loads}
        for entry in seq.chain:
            if entry.is_ready or id(entry) in scheduled or not step.completes(entry.parent):
                continue
            num_tokens = self._chunk(entry.num_tokens - entry.num_computed, budget.num_even)
            if num_tokens:
                step.loads.append(ScheduledLoad(entry, entry.num_computed, num_tokens))
                budget.take(num_tokens)

    def _chunk(self, wanted: int, most: int) -> int:
        """Tokens to run of `wanted`; strict mode cuts at fixed places whatever else is in the batch."""
        if self.config.strict:
            wanted = min(wanted, max(1, self.config.max_num_batched_tokens // 2))
            return wanted if wanted <= most else 0
        return max(0, min(wanted, most))

    def _schedule_decode(self, step: Schedule, seq: Sequence) -> None:
        """Add the row's one token, preempting younger rows (or itself) where it finds no block."""
        size = self.config.block_size
        if seq.num_computed == len(seq.blocks) * size:
            scheduled = {id(row.seq) for row in step.rows}
            while not self.blocks.can_allocate(1):
                if any(other.is_done for other in self.running):  # its blocks come back with the next landing
                    return
                others = [s for s in self.running if s is not seq and id(s) not in scheduled]
                victim = max(others, key=lambda s: s.arrived, default=seq)
                if victim.arrived <= seq.arrived:
                    self._preempt(seq)
                    return
                self._preempt(victim)
            self._grow(seq, 1)
        step.rows.append(ScheduledRow(seq, seq.num_computed, 1))
        self.waiting.charge(seq, num_written=1)

    def _schedule_prefill(self, step: Schedule, seq: Sequence, budget: Budget) -> None:
        """Add the row's source and a chunk of its target once its prompts are there."""
        if seq.chain and not step.completes(seq.chain[-1]):
            return
        if not seq.num_source_tokens:
            self._schedule_target(step, seq, budget, budget.num_even)
        elif self._schedule_source(step, seq, budget):  # it makes the step long: its target's beginning is little more
            self._schedule_target(step, seq, budget, budget.num_tokens)

    def _schedule_source(self, step: Schedule, seq: Sequence, budget: Budget) -> bool:
        """Add the row's source, whole, where it fits; whether it does."""
        num_tokens = seq.num_source_tokens
        num_blocks = -(-seq.num_kept_tokens // self.config.block_size)
        if num_tokens > budget.num_tokens or not self.blocks.can_allocate(num_blocks):
            return False
        seq.source_blocks = self.blocks.allocate(num_blocks)
        step.sources.append(seq)
        budget.take(num_tokens)
        return True

    def _schedule_target(self, step: Schedule, seq: Sequence, budget: Budget, most: int) -> None:
        """Add a chunk of the row's target, of so many tokens at most."""
        size = self.config.block_size
        num_tokens = self._chunk(seq.num_uncomputed, most)
        extra = seq.num_candidate_tokens
        if extra and num_tokens == seq.num_uncomputed and num_tokens + extra > budget.num_tokens:
            num_tokens -= 1  # the last token goes with the candidates, in a step that holds them all
        room = (len(seq.blocks) + self.blocks.num_allocatable) * size - seq.num_computed
        num_tokens = min(num_tokens, room)
        if num_tokens <= 0:
            return
        missing = -(-(seq.num_computed + num_tokens) // size) - len(seq.blocks)
        row = ScheduledRow(seq, seq.num_computed, num_tokens)
        if not row.is_final:
            extra = 0
        if not self.blocks.can_allocate(max(0, missing) + -(-extra // size)):
            return
        if missing > 0:
            self._grow(seq, missing)
        if extra:
            row.candidate_blocks = self.blocks.allocate(-(-extra // size))
        step.rows.append(row)
        budget.take(num_tokens + extra)

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
        self.waiting.put_back(seq)
        self.num_preemptions += 1

    def _admit(self, seq: Sequence) -> bool:
        """Pin the chain, reuse a cached text prefix; False where there is no room now."""
        chain = self.prompts.acquire(seq.request.salt, seq.segments, seq.request.share.max_resident_bytes)
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

    def register_blocks(self, seq: Sequence, num_landed: int) -> None:
        """Make the sequence's newly filled blocks findable by later texts, as far as their steps have landed."""
        if not self.config.enable_prefix_caching or self.config.strict:
            return
        size = self.config.block_size
        while (seq.num_registered_blocks + 1) * size <= min(seq.num_computed, num_landed):
            start = seq.num_registered_blocks * size
            tokens = tuple(seq.token_ids[start : start + size])
            seq.prefix_node = self.blocks.register(seq.prefix_node, tokens, seq.blocks[seq.num_registered_blocks])
            seq.num_registered_blocks += 1

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, whatever its state; its blocks and pins are free afterwards."""
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self.waiting.stop(seq)
        else:
            self.waiting.remove(seq)
        self.waiting.close(seq)
        seq.status = SequenceStatus.FINISHED
        self._free(seq)

    def _free(self, seq: Sequence) -> None:
        self.blocks.release(seq.blocks)
        self.blocks.release(seq.source_blocks)
        self.prompts.release(seq.chain)
        seq.blocks, seq.source_blocks, seq.chain = [], [], ()
