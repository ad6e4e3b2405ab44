"""Steps that name blobs: written before, there in the step itself, and never lost to somebody who deletes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from promptd_store.base import Content, HasBlob, Store
from promptd_store.errors import BlobNotFoundError, StoreUnavailableError

MAX_PUTS = 10

_T = TypeVar("_T")


async def naming_blobs(
    store: Store, tenant: str, blobs: Mapping[str, Content], step: Callable[[Sequence[HasBlob]], Awaitable[_T]]
) -> _T:
    """Take a step that requires these blobs (by their digests), which were put before.

    One that was deleted meanwhile, with something else that had the same bytes, is put again.
    """
    needs = [HasBlob(tenant, digest) for digest in blobs]
    for _ in range(MAX_PUTS):
        try:
            return await step(needs)
        except BlobNotFoundError as error:
            if error.param is None or error.param not in blobs:
                raise
            await store.put_blob(tenant, blobs[error.param])
    raise StoreUnavailableError("what is written is deleted again and again")
