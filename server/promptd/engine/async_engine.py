"""The engine's thread, and the asyncio side of it: submit, abort, drain."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from promptd.engine.deadlines import next_deadline, overdue
from promptd.engine.engine import Engine
from promptd.engine.request import (
    GenerateRequest,
    Output,
    PoolOutput,
    PoolRequest,
    Request,
    RequestOutput,
    ScoreOutput,
    ScoreRequest,
)
from promptd.engine.sequence import Sequence
from promptd.engine.spare_time import SpareTime, Turns
from promptd.engine.stats import EngineStats
from promptd.engine.stream import Stream
from promptd.errors import EngineDeadError, InvalidRequestError, PromptdError, ShuttingDownError, SlowReaderError

_IDLE_WAIT_SECONDS = 1.0
_LATE_SECONDS = 0.02
"""The engine looks at deadlines between two steps; after a deadline and so long, the event loop looks itself."""


class AsyncEngine:
    """Runs an `Engine` in its own thread. All methods are called on the event loop's thread."""

    def __init__(
        self, engine: Engine, spare_time: SpareTime | None = None, *, spare_seconds_per_step: float = 0.005
    ) -> None:
        self.engine = engine
        self._wake = threading.Event()
        self.spare_time = spare_time
        self._turns = Turns(spare_seconds_per_step)
        if spare_time is not None:
            spare_time.wake = self._wake.set
        self._inbox: deque[Sequence | str | Callable[[], object]] = deque()  # a str is the id of a request to abort
        self._streams: dict[str, Stream] = {}
        self._stats = engine.stats()
        self._progress = time.monotonic()
        self._is_stopping = False
        self._is_draining = False
        self._death: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="promptd-engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread; answers go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def ended(self) -> None:
        """Wait for the end of the engine's thread; raises what it died of, where nobody asked for its end."""
        await asyncio.to_thread(self._thread.join)
        if self._death is not None:
            raise self._death

    async def shutdown(self, drain_seconds: float = 0) -> None:
        """Refuse new requests, let running ones finish for a while, end the rest with a typed error."""
        self._is_draining = True
        until = time.monotonic() + drain_seconds
        while self._streams and time.monotonic() < until and self._death is None:  # noqa: ASYNC110 - a deadline
            await asyncio.sleep(0.02)
        self._is_stopping = True
        self._wake.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        self._fail_all(ShuttingDownError("the server stopped before this request was done"))

    def submit(self, request: GenerateRequest) -> Stream:
        """Queue a generation; raises at once what can be known before it runs."""
        return self._enter(request)

    async def score(self, request: ScoreRequest) -> ScoreOutput:
        """Score candidates; raises typed errors."""
        output = await self._enter(request).next_output()
        if not isinstance(output, ScoreOutput):
            raise EngineDeadError(f"the engine lost request {request.request_id!r}")
        return output

    def abort(self, request_id: str) -> None:
        """End a request at the next step boundary."""
        stream = self._forget(request_id)
        if stream is not None:
            stream.close()
        self._inbox.append(request_id)
        self._wake.set()

    async def erase(self, salt: str, versions: Collection[str] | None, spread: Collection[str] = ()) -> int:
        """Forget K/V between two steps, see `Engine.erase`; 0 where the engine has ended, and its memory with it."""
        return await self._between_steps(lambda: self.engine.erase(salt, versions, spread))

    async def resident_bytes(self, version: str, salts: Collection[str]) -> int:
        """Bytes of K/V that are kept of a version, see `PromptCache.bytes_of`; 0 where the engine has ended."""
        return await self._between_steps(lambda: self.engine.prompts.bytes_of(version, salts))

    async def _between_steps(self, work: Callable[[], int]) -> int:
        """Have the engine's thread do something before its next step; 0 where it has ended."""
        if not self._thread.is_alive():
            return 0
        done: asyncio.Future[int] = self._loop.create_future()
        self._inbox.append(lambda: self._loop.call_soon_threadsafe(done.set_result, work()))
        self._wake.set()
        while not done.done() and self._thread.is_alive():
            await asyncio.wait([done], timeout=_IDLE_WAIT_SECONDS)
        return done.result() if done.done() else 0

    def stats(self) -> EngineStats:
        """The reading taken after the newest step."""
        return self._stats

    def seconds_since_progress(self) -> float:
        """How long the engine has had work without finishing a step; 0.0 when idle."""
        if self._death is not None:
            return float("inf")
        return time.monotonic() - self._progress if self._streams else 0.0

    async def pool(self, request: PoolRequest) -> PoolOutput:
        """Read numbers off a text; raises typed errors."""
        output = await self._enter(request).next_output()
        if not isinstance(output, PoolOutput):
            raise EngineDeadError(f"the engine lost request {request.request_id!r}")
        return output

    def _enter(self, request: Request) -> Stream:
        if self._death is not None:
            raise EngineDeadError(f"the engine ended: {self._death}")
        if self._is_draining:
            raise ShuttingDownError("the server is shutting down", retry_after_seconds=5)
        if request.request_id in self._streams:
            raise InvalidRequestError(f"request id {request.request_id!r} is running already", param="request_id")
        seq = self.engine.prepare(request, num_ahead=len(self._inbox))
        stream = Stream(request.request_id, self.abort)
        if not self._streams:
            self._progress = time.monotonic()
        self._streams[request.request_id] = stream
        self._watch(stream, seq)
        self._inbox.append(seq)
        self._wake.set()
        return stream

    def _watch(self, stream: Stream, seq: Sequence) -> None:
        """Have the sequence looked at when its next deadline has passed: one step may take longer than that."""
        now = time.monotonic()
        due = next_deadline(seq, self.engine.config, now)
        if due is not None:
            delay = due - now + _LATE_SECONDS
            stream.timer = asyncio.get_running_loop().call_later(delay, self._look, stream, seq)

    def _look(self, stream: Stream, seq: Sequence) -> None:
        error = overdue(seq, self.engine.config, time.monotonic())
        if error is None:
            self._watch(stream, seq)
        else:
            self._end(stream, error)

    def _end(self, stream: Stream, error: PromptdError) -> None:
        """End a request from this side; its row goes at the next step boundary."""
        self._forget(stream.request_id)
        stream.deliver(RequestOutput(stream.request_id, error=error))
        self._inbox.append(stream.request_id)
        self._wake.set()

    def _forget(self, request_id: str) -> Stream | None:
        stream = self._streams.pop(request_id, None)
        if stream is not None and stream.timer is not None:
            stream.timer.cancel()
        return stream

    # -- the engine's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.engine.model.use_device()
            while not self._is_stopping:
                self._wake.clear()  # before the inbox is read: what comes after sets it again
                self._take_in()
                if self.spare_time is not None and self.spare_time.has_work:
                    self._land()
                    self._turns.begin_slice()
                    self.spare_time.run(self._serve)
                    if self._death is not None:
                        raise self._death
                elif (wait := self.engine.seconds_to_gather()) > 0:
                    self._wake.wait(wait)
                elif self.engine.has_work:
                    self._step()
                else:
                    self._stats = self.engine.stats()
                    self._wake.wait(_IDLE_WAIT_SECONDS)
        except Exception as error:
            self._death = error
            self._loop.call_soon_threadsafe(self._fail_all, EngineDeadError(f"the engine ended: {error!r}"))
            raise

    def _serve(self) -> None:
        """Between two slices of spare time: step until nobody waits or the next slice is due. Never raises."""
        self._turns.end_slice()
        try:
            is_due = False
            while not (is_due or self._is_stopping or self._death):
                self._take_in()
                if not self.engine.has_work:
                    self._turns.idle()
                    break
                self._step()
                is_due = self._turns.stepped()
            self._land()
        except Exception as error:  # noqa: BLE001 - the engine's death, not the fault of what runs around this
            self._death = error
        self._turns.begin_slice()

    def _step(self) -> None:
        self._hand_over(self.engine.step())

    def _land(self) -> None:
        """Wait for the step in flight, before something that may take long."""
        self._hand_over(self.engine.land())

    def _hand_over(self, outputs: list[Output]) -> None:
        self._progress = time.monotonic()
        self._stats = self.engine.stats()
        if outputs:
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _take_in(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                self.engine.abort(item)
            elif isinstance(item, Sequence):
                self.engine.enqueue(item)
            else:
                item()

    # -- back on the event loop -------------------------------------------------------------------

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:  # it was aborted meanwhile
                continue
            if output.is_last:
                self._forget(output.request_id)
            elif stream.is_overrun:
                self._end(stream, SlowReaderError("the answer was not read while it was made"))
                continue
            stream.deliver(output)

    def _fail_all(self, error: PromptdError) -> None:
        for request_id, stream in list(self._streams.items()):
            self._forget(request_id)
            stream.deliver(RequestOutput(request_id, error=error))
