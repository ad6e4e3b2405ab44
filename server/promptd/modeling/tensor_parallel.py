"""One model over several devices of a machine, by transformers' tensor-parallel plans: one process leads.

Each process holds some heads of every layer, and of every K/V slot the part of these heads; their sums meet in every
layer. The engine runs in the leader alone. What it does with model and pool it says to the others first, over their
standard input: a line of JSON and the bytes of tensors. A pass that fails half-way leaves the processes apart; the
leader then ends, and whoever started it starts it again.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch

from promptd.errors import ModelRefusedError
from promptd.modeling.frozen import FrozenModel, attention_for
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.load import load_model
from promptd.modeling.packed_batch import PackedBatch, PackedRow, Virtual
from promptd.modeling.ranks import Rank
from promptd.modeling.shared_spans import Span

COLLECTIVE_SECONDS = 600.0
"""How long the slowest process may take to the same place in loading or in a pass."""
GRACE_SECONDS = 3.0
"""For the leader to say itself what is wrong, where loading failed everywhere."""


@dataclass(frozen=True, slots=True)
class Order:
    """What all processes do next."""

    what: str
    fields: Mapping[str, Any]
    tensors: Sequence[torch.Tensor] = ()

    def write(self, stream: IO[bytes]) -> None:
        """Say it to a follower."""
        shapes = [[str(one.dtype).removeprefix("torch."), list(one.shape)] for one in self.tensors]
        stream.write(json.dumps({"what": self.what, "fields": self.fields, "tensors": shapes}).encode() + b"\n")
        for tensor in self.tensors:
            stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        stream.flush()

    @classmethod
    def read(cls, stream: IO[bytes]) -> Order | None:
        """Hear it; None where the leader is gone."""
        line = stream.readline()
        if not line.endswith(b"\n"):
            return None
        plain, tensors = json.loads(line), []
        for dtype, shape in plain["tensors"]:
            empty = torch.empty(shape, dtype=getattr(torch, dtype))
            data = bytearray(stream.read(empty.numel() * empty.element_size()))
            tensors.append(torch.frombuffer(data, dtype=empty.dtype).reshape(shape) if data else empty)
        return cls(plain["what"], plain["fields"], tensors)


def order_of(rows: Sequence[PackedRow]) -> Order:
    """Return the order to run packed rows."""
    tensors = [virtual.embeds for row in rows for virtual in row.virtual]
    plain = [
        {
            "token_ids": list(row.token_ids),
            "first_position": row.first_position,
            "slots": list(row.slots),
            "context": list(row.context),
            "logits": list(row.logits),
            "offsets": [virtual.offset for virtual in row.virtual],
        }
        for row in rows
    ]
    return Order("run", {"rows": plain}, tensors)


def rows_of(order: Order) -> list[PackedRow]:
    """Return the rows that an order is about."""
    embeds = iter(order.tensors)
    rows = []
    for plain in order.fields["rows"]:
        virtual = tuple(Virtual(offset, next(embeds)) for offset in plain.pop("offsets"))
        context = [(first, count) for first, count in plain.pop("context")]
        rows.append(PackedRow(**plain, context=context, virtual=virtual))
    return rows


class Followers:
    """The other processes, as the leader sees them."""

    def __init__(self, size: int, load: Mapping[str, Any]) -> None:
        self.size = size
        self._closed = threading.Event()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "promptd.modeling.follower"]
        self._processes = [
            subprocess.Popen(  # noqa: S603 - our own module
                command,
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno(),
                env={**os.environ, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(torch.get_num_threads())},
                start_new_session=True,  # a person's Ctrl-C is for the leader, which lets running requests finish
            )
            for rank in range(1, size)
        ]
        atexit.register(self.close)
        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()
            place = {**asdict(Rank(rank, size)), "port": port, "device": load["device"]}
            _tell(process, Order("load", {"place": place, "model": load}))
        join(Rank(0, size), port, load["device"])

    def tell(self, orders: Sequence[Order]) -> None:
        """Say to each follower its own."""
        for process, order in zip(self._processes, orders, strict=True):
            _tell(process, order)

    def tell_all(self, order: Order) -> None:
        """Say the same to all."""
        self.tell([order] * (self.size - 1))

    def close(self) -> None:
        """End them: they leave when there are no more orders."""
        if self._closed.is_set():
            return
        self._closed.set()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def abandon(self, why: str) -> None:
        """End this process: the others are somewhere else in the model, and there is no way back to them."""
        sys.stderr.write(f"promptd: {why}: the devices that share the model are apart; ending\n")
        sys.stderr.flush()
        os._exit(1)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._closed.wait(GRACE_SECONDS):
            self.abandon(f"process {process.pid} has ended with status {status}")


def _tell(process: subprocess.Popen[bytes], order: Order) -> None:
    if process.stdin is None:
        raise RuntimeError("a follower has no standard input")
    order.write(process.stdin)


def join(rank: Rank, port: int, device: str) -> None:
    """Meet the others."""
    torch.distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank.index,
        world_size=rank.size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )


class ParallelPool(KVPool):
    """The leader's part of each slot; the followers have theirs."""

    def __init__(self, followers: Followers, **sizes: Any) -> None:
        super().__init__(**sizes)
        self._followers = followers
        followers.tell_all(Order("pool", {"num_slots": self.num_slots}))

    def load_prefix(self, spans: Sequence[Span], prefix: torch.Tensor) -> None:
        """Copy a learned prefix, each process its heads of it."""
        parts = prefix.chunk(self._followers.size, dim=2)
        plain = {"spans": list(spans)}
        self._followers.tell([Order("prefix", plain, [part]) for part in parts[1:]])
        super().load_prefix(spans, parts[0])


@dataclass(frozen=True, eq=False)
class ParallelModel(FrozenModel):
    """The leader's part of a model; a pass over it is a pass of all."""

    followers: Followers

    def make_pool(self, num_slots: int) -> KVPool:
        """Make the K/V pool of the only engine that may run on this model."""
        return ParallelPool(self.followers, **self.pool_sizes(num_slots))

    @property
    def runs_ahead(self) -> bool:
        """The others are told tokens that this process knows."""
        return False

    def steps_over(self, pool: KVPool) -> None:
        """Nothing is faster: of a graph that the leader replays the others would hear nothing."""

    @torch.no_grad()
    def forward_packed(self, batch: PackedBatch) -> torch.Tensor:
        """Read one step's targets; what is wrong with the rows themselves is found before anybody is told."""
        embeds = self.embed_rows(batch)
        order = order_of(batch.rows)
        try:
            self.followers.tell_all(order)
            return self.forward(embeds, batch.position_ids, batch.logits_index, attention_for(batch))
        except Exception as error:  # wherever it stands, the others are not there
            self.followers.abandon(f"{type(error).__name__}: {error}")
            raise


def load_parallel(
    path_or_id: str | Path,
    size: int,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    served_name: str | None = None,
) -> ParallelModel:
    """Load one part of a decoder in this process and the others in `size - 1` processes beside it.

    On CUDA each takes one device, from the first. Raises `ModelRefusedError` where the model cannot be divided so.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind not in ("cpu", "cuda"):
        raise ModelRefusedError(f"device {device!r}: with tensor_parallel each process takes its own, cpu or cuda")
    if kind == "cuda" and torch.cuda.device_count() < size:
        raise ModelRefusedError(f"tensor_parallel {size}: there are {torch.cuda.device_count()} devices")
    load = {"path_or_id": str(path_or_id), "device": kind, "dtype": dtype, "max_model_len": max_model_len}
    followers = Followers(size, load)
    try:
        model = load_model(**load, served_name=served_name, rank=Rank(0, size))  # type: ignore[arg-type]
    except BaseException:
        followers.close()
        raise
    return ParallelModel(**{one.name: getattr(model, one.name) for one in fields(model)}, followers=followers)
