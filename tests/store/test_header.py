"""The header parser: refuses every hostile file with its own code, before anything is allocated."""

from __future__ import annotations

import contextlib
import io
import pickle
import time
import tracemalloc
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from promptd_store import ArtifactError
from promptd_store.header import MAX_HEADER_BYTES, Header, read_header

from tests.store.files import bare_file, entry, raw_file, soft

GOOD = {"prompt_embeddings": entry([5, 48], 960)}
DATA = bytes(960)


def zip_bytes() -> bytes:
    """What torch.save has written since 1.6."""
    stream = io.BytesIO()
    torch.save({"prompt_embeddings": soft()}, stream)
    assert zipfile.is_zipfile(stream)
    return stream.getvalue()


def one(**changes: Any) -> dict[str, Any]:
    """The good header with its only entry changed."""
    return {"prompt_embeddings": {**GOOD["prompt_embeddings"], **changes}}


MANY = {f"t{i}": entry([0], 0) for i in range(100_000)}

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven bytes": (b"\x08\0\0\0\0\0\0", "truncated"),
    "length only": (raw_file(b"", header_bytes=2), "truncated"),
    "header cut": (raw_file(b'{"a"', header_bytes=40), "truncated"),
    "data cut": (raw_file(GOOD, DATA[:-1]), "truncated"),
    "data missing": (raw_file(GOOD), "truncated"),
    "header bomb": (raw_file(b"{}", header_bytes=1 << 62), "header_too_large"),
    "header of 100 MB claimed": (raw_file(b"{}", header_bytes=100 << 20), "header_too_large"),
    "header just too large": (raw_file(b"{}" + b" " * MAX_HEADER_BYTES), "header_too_large"),
    "100,000 zero-size tensors": (raw_file(MANY), "header_too_large"),
    "many tensors": (raw_file({f"t{i}": entry([1], 4, begin=4 * i) for i in range(7)}, bytes(28)), "too_many_tensors"),
    "pickle": (pickle.dumps({"prompt_embeddings": [0.0] * 240}), "unsupported_format"),
    "old pickle": (pickle.dumps({"prompt_embeddings": [0.0] * 240}, protocol=2), "unsupported_format"),
    "zip": (zip_bytes(), "unsupported_format"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "unsupported_format"),
    "json": (b'{"prompt_embeddings": []}', "unsupported_format"),
    "numpy": (b"\x93NUMPY\x01\0v\0{'descr'", "unsupported_format"),
    "leading space": (raw_file(b' {"a": 1}'), "header_invalid_json"),
    "not JSON": (raw_file(b"{nope}"), "header_invalid_json"),
    "NaN in JSON": (raw_file(b'{"a": NaN}'), "header_invalid_json"),
    "infinite number in JSON": (raw_file(b'{"a": 1e999}'), "header_invalid_json"),
    "lone surrogate": (raw_file(b'{"\\ud800": 1}'), "header_invalid_json"),
    "deep nesting": (raw_file(b'{"a":' * 10_000), "header_invalid_json"),
    "deep lists": (raw_file(b'{"a":' + b"[" * 60_000), "header_invalid_json"),
    "number of 5,000 digits": (raw_file(b'{"a":' + b"9" * 5_000 + b"}"), "header_invalid_json"),
    "latin-1": (raw_file(b'{"\xe9": 1}'), "header_invalid_utf8"),
    "duplicate tensor": (
        raw_file(b'{"prompt_embeddings":{},"prompt_embeddings":{}}'),
        "header_duplicate_key",
    ),
    "duplicate inner key": (
        raw_file(b'{"prompt_embeddings":{"dtype":"F32","dtype":"F16"}}'),
        "header_duplicate_key",
    ),
    "metadata list": (raw_file({"__metadata__": []}), "metadata_invalid"),
    "metadata number": (raw_file({"__metadata__": {"a": 1}}), "metadata_invalid"),
    "path in a name": (raw_file({"../../etc/passwd": GOOD["prompt_embeddings"]}, DATA), "tensor_name_not_allowed"),
    "NUL in a name": (raw_file({"prompt_embeddings\0": GOOD["prompt_embeddings"]}, DATA), "tensor_name_not_allowed"),
    "long name": (raw_file({"x" * 50_000: GOOD["prompt_embeddings"]}, DATA), "tensor_name_not_allowed"),
    "LoRA": (
        raw_file({"base_model.model.q.lora_A.weight": GOOD["prompt_embeddings"]}, DATA),
        "tensor_name_not_allowed",
    ),
    "multitask": (raw_file({"prefix_task_cols": GOOD["prompt_embeddings"]}, DATA), "tensor_name_not_allowed"),
    "entry not an object": (raw_file({"prompt_embeddings": 3}), "header_invalid_entry"),
    "extra field": (raw_file(one(extra=1), DATA), "header_invalid_entry"),
    "missing field": (raw_file({"prompt_embeddings": {"dtype": "F32"}}), "header_invalid_entry"),
    "float64": (bare_file(soft().double()), "dtype_not_allowed"),
    "bool dtype": (raw_file(one(dtype="BOOL"), DATA), "dtype_not_allowed"),
    "unhashable dtype": (raw_file(one(dtype=["F32"]), DATA), "dtype_not_allowed"),
    "zero size": (raw_file(one(shape=[0, 48], data_offsets=[0, 0])), "shape_invalid"),
    "negative size": (raw_file(one(shape=[-5, -48]), DATA), "shape_invalid"),
    "true as a size": (raw_file(one(shape=[True, 240]), DATA), "shape_invalid"),
    "float size": (raw_file(one(shape=[5.0, 48]), DATA), "shape_invalid"),
    "huge size": (raw_file(one(shape=[1 << 62, 0]), DATA), "shape_invalid"),
    "rank 0": (raw_file(one(shape=[]), DATA), "shape_invalid"),
    "rank 200": (raw_file(one(shape=[1] * 200), DATA), "shape_invalid"),
    "shape text": (raw_file(one(shape="5,48"), DATA), "shape_invalid"),
    "negative offset": (raw_file(one(data_offsets=[-960, 0]), DATA), "offsets_invalid"),
    "reversed offsets": (raw_file(one(data_offsets=[960, 0]), DATA), "offsets_invalid"),
    "offsets too wide": (raw_file(one(data_offsets=[0, 964]), DATA), "offsets_invalid"),
    "three offsets": (raw_file(one(data_offsets=[0, 480, 960]), DATA), "offsets_invalid"),
    "hole at the start": (raw_file(one(data_offsets=[4, 964]), bytes(964)), "offsets_invalid"),
    "overlap": (
        raw_file({"prompt_embeddings": entry([240], 960), "prefix": entry([240], 960)}, DATA),
        "offsets_invalid",
    ),
    "beyond the file": (raw_file(one(shape=[5, 1 << 30], data_offsets=[0, 20 << 30]), DATA), "truncated"),
    "polyglot trailing bytes": (raw_file(GOOD, DATA + b"PK\x03\x04evil"), "trailing_bytes"),
    "data without tensors": (raw_file({}, b"x"), "trailing_bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_has_its_code(name: str) -> None:
    """Each kind of broken file is refused with its own 4xx code, fast and without memory."""
    content, code = HOSTILE[name]
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ArtifactError) as caught:
        read_header(content)
    seconds = time.process_time() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (caught.value.code, caught.value.status) == (code, 422)
    assert len(caught.value.message) < 500
    assert seconds < 0.2 and peak < 8 << 20


def test_good_header_passes() -> None:
    """The control: the file that all others were derived from is accepted."""
    header = read_header(raw_file(GOOD, DATA))
    assert [(one.name, one.shape, one.end - one.begin) for one in header.tensors] == [
        ("prompt_embeddings", (5, 48), 960)
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64"]) | JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=6) | JSON,
        "data_offsets": st.lists(st.integers(-4, 400), max_size=3) | JSON,
    }
)
HEADER = st.dictionaries(st.sampled_from(["prompt_embeddings", "prefix", "__metadata__"]) | st.text(), ENTRY | JSON)


def read_or_refuse(content: bytes) -> Header | None:
    """Any other exception fails the test."""
    with contextlib.suppress(ArtifactError):
        return read_header(content)
    return None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200) | st.builds(raw_file, HEADER | JSON, st.binary(max_size=64)))
def test_parser_raises_nothing_else(content: bytes) -> None:
    """Whatever the bytes, the parser returns a header that covers them exactly, or raises ArtifactError."""
    header = read_or_refuse(content)
    if header is not None:
        size = 8 + int.from_bytes(content[:8], "little")
        assert sum(one.end - one.begin for one in header.tensors) == len(content) - size


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 127), st.integers(0, 255))
def test_one_changed_byte_is_survived(position: int, value: int) -> None:
    """Flipping any byte of a good header gives a header or an ArtifactError."""
    content = bytearray(raw_file(GOOD, DATA))
    content[position] = value
    read_or_refuse(bytes(content))
