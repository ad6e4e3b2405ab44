"""Training files: what is kept, what is refused, and that nothing stays after deletion."""

from __future__ import annotations

import pytest
from promptd_store import Store, collect_garbage

from promptd.errors import InvalidRequestError, NotFoundError, PayloadTooLargeError, PromptdError
from promptd.jobs import JobQueue, TrainingFiles
from promptd.jobs.files import MAX_LINE_BYTES
from tests.jobs.conftest import ROWS, Clock, created, make_worker

pytestmark = pytest.mark.anyio


async def test_round_trip(files: TrainingFiles, clock: Clock) -> None:
    """A file comes back as it was, with its name, size and time."""
    record = await files.create("acme", "train.jsonl", ROWS)
    assert record.id.startswith("file-")
    assert (record.filename, record.num_bytes, record.created_at) == ("train.jsonl", len(ROWS), clock.now)
    assert await files.get("acme", record.id) == record
    assert await files.content("acme", record.id) == ROWS


async def test_files_belong_to_a_tenant(files: TrainingFiles) -> None:
    """A foreign file looks exactly like one that never was."""
    record = await files.create("acme", "train.jsonl", ROWS)
    told = []
    for file_id in (record.id, "file-none"):
        for ask in (files.get, files.content, files.delete):
            with pytest.raises(NotFoundError) as caught:
                await ask("eve", file_id)
            told.append(str(caught.value).replace(file_id, "ID"))
    assert len(set(told)) == 1
    assert await files.list("eve") == []
    assert await files.content("acme", record.id) == ROWS


async def test_list_is_newest_first_and_paged(files: TrainingFiles, clock: Clock) -> None:
    """Files are listed by age; a page goes on behind the last file of the one before."""
    ids = []
    for number in range(5):
        clock.now += 0.001
        ids.append((await files.create("acme", f"{number}.jsonl", ROWS)).id)
    assert [one.id for one in await files.list("acme")] == ids[::-1]
    first = await files.list("acme", limit=2)
    assert [one.id for one in await files.list("acme", after=first[-1].id, limit=2)] == ids[2:0:-1]


@pytest.mark.parametrize(
    ("filename", "content", "error", "told"),
    [
        ("a", b"", InvalidRequestError, "no rows at all"),
        ("a", b" \n\n", InvalidRequestError, "no rows at all"),
        ("a", ROWS + b"\xff\xfe", InvalidRequestError, "line 2: not UTF-8"),
        ("a", ROWS + b"x" * (MAX_LINE_BYTES + 1), InvalidRequestError, f"line 2: has {MAX_LINE_BYTES + 1} bytes"),
        ("a", b"x" * (5 << 20), PayloadTooLargeError, "at most 5000000 are allowed"),
        ("", ROWS, InvalidRequestError, "filename must have 1 to 255 printable characters, got ''"),
        ("a\nb", ROWS, InvalidRequestError, r"got 'a\nb'"),
        ("a" * 256, ROWS, InvalidRequestError, "filename must"),
    ],
)
async def test_bad_files_are_refused(
    store: Store, filename: str, content: bytes, error: type[PromptdError], told: str
) -> None:
    """What cannot be JSON lines is refused with the line's number, and leaves nothing behind."""
    files = TrainingFiles(store, max_bytes=5_000_000)
    with pytest.raises(error) as caught:
        await files.create("acme", filename, content)
    assert told in str(caught.value) and caught.value.param == "file"
    assert await store.scan("{") == [] and await store.scan_blobs("acme") == []


async def test_nothing_is_kept_after_deletion(store: Store, files: TrainingFiles) -> None:
    """A deleted file is gone at once, its bytes with the next collection, unless another file has the same."""
    one, two = [await files.create("acme", name, ROWS) for name in ("one", "two")]
    await files.delete("acme", one.id)
    with pytest.raises(NotFoundError):
        await files.get("acme", one.id)
    assert await collect_garbage(store, "acme", unused_for_seconds=0) == []
    assert await files.content("acme", two.id) == ROWS
    await files.delete("acme", two.id)
    assert await collect_garbage(store, "acme", unused_for_seconds=0) == [two.digest]
    assert await store.scan("{") == [] and await store.scan_blobs("acme") == []


async def test_jobs_keep_their_blobs_while_they_need_them(store: Store, queue: JobQueue, clock: Clock) -> None:
    """A collection leaves the rows and the checkpoint of an open job alone; when it has ended, both go."""
    job = await created(queue)
    worker = make_worker(store, clock)
    (claim,) = await worker.claim(1)
    claim = await worker.save_checkpoint(claim, b"state", 1)
    assert await collect_garbage(store, "acme", unused_for_seconds=0) == []
    assert (await worker.data(claim)).training == ROWS
    assert await worker.load_checkpoint(claim) == b"state"
    await queue.cancel("acme", job.id)
    await worker.release(claim)
    assert await collect_garbage(store, "acme", unused_for_seconds=0) == [job.spec.rows_digest]
    assert await store.scan_blobs("acme") == []
