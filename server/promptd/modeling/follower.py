"""A process that holds one part of a model and runs what the leader says: `python -m promptd.modeling.follower`."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

import torch

from promptd.errors import ModelRefusedError
from promptd.modeling.frozen import FrozenModel
from promptd.modeling.kv_pool import KVPool
from promptd.modeling.load import load_model
from promptd.modeling.packed_batch import PackedBatch
from promptd.modeling.ranks import Rank
from promptd.modeling.tensor_parallel import Order, join, rows_of


def follow(orders: BinaryIO) -> None:
    """Load, then do what is said until there is nobody to say it."""
    first = Order.read(orders)
    if first is None:
        return
    place, load = first.fields["place"], first.fields["model"]
    rank = Rank(place["index"], place["size"])
    join(rank, place["port"], place["device"])
    model = load_model(**load, rank=rank)
    pool: KVPool | None = None
    while (order := Order.read(orders)) is not None:
        if order.what == "pool":
            pool = None  # the one before goes first
            pool = model.make_pool(order.fields["num_slots"])
        elif pool is not None:
            _obey(order, model, pool)


@torch.no_grad()
def _obey(order: Order, model: FrozenModel, pool: KVPool) -> None:
    if order.what == "prefix":
        pool.load_prefix([(first, count) for first, count in order.fields["spans"]], order.tensors[0])
    else:
        model.forward_packed(PackedBatch(rows_of(order), pool))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        follow(sys.stdin.buffer)
    except ModelRefusedError:  # the leader says why
        os._exit(1)
    os._exit(0)  # the leader is gone: no one is there to take leave of
