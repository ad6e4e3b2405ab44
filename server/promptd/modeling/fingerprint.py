"""Identity of a base model: what it is, not how its files are cut."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

_CHUNK_BYTES = 1 << 22


def _stored_digests(file: Path) -> Iterator[tuple[str, str, list[int], str]]:
    """Yield (name, dtype, shape, sha256) of every tensor in a safetensors file, as stored."""
    with file.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(header_bytes))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            stream.seek(8 + header_bytes + begin)
            digest, left = hashlib.sha256(), end - begin
            while left:
                chunk = stream.read(min(left, _CHUNK_BYTES))
                digest.update(chunk)
                left -= len(chunk)
            yield name, entry["dtype"], entry["shape"], digest.hexdigest()


def fingerprint_files(architecture: str, files: list[Path]) -> str:
    """Return `sha256:…` over architecture and all stored tensors; the same for one file or many shards."""
    tensors = sorted(row for file in files for row in _stored_digests(file))
    return _digest(architecture, tensors)


def fingerprint_tensors(architecture: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """The same for a model in memory: used where there are no files, and to show that training changed nothing."""
    rows = []
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        rows.append((name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(raw).hexdigest()))
    return _digest(architecture, rows)


def _digest(architecture: str, rows: list[tuple[str, str, list[int], str]]) -> str:
    text = json.dumps({"architecture": architecture, "tensors": rows}, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
