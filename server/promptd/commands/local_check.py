"""The checks of an upload, made on this machine: all of them with a base model, the structural ones without."""

from __future__ import annotations

from dataclasses import dataclass

from promptd_client import LocalFileError, PeftFolder
from promptd_store import ArtifactError, BaseModelSpec, PromptKind, StoreError, check_name, decode, read_peft
from promptd_store.codec import METADATA_KEY
from promptd_store.header import TensorEntry, read_header
from promptd_store.manifest import Manifest
from promptd_store.peft_config import AdapterConfig, parse_adapter_config

from promptd.commands.sources import Source


@dataclass(frozen=True, slots=True)
class Checked:
    """What a prompt is, or the error that an upload would meet."""

    kind: str | None = None
    num_virtual_tokens: int | None = None
    num_bytes: int | None = None
    error: str | None = None


def check_source(source: Source, spec: BaseModelSpec | None) -> Checked:
    """Check one prompt as the server would, as far as that is known here."""
    try:
        check_name(source.name)
        content = source.read()
        if spec is not None:
            return _check_fully(content, spec)
        return _check_file(content) if isinstance(content, bytes) else _check_peft(content)
    except StoreError as error:
        return Checked(error=f"{error.code}: {error.message}")
    except LocalFileError as error:
        return Checked(error=f"not_readable: {error}")


def _check_fully(content: PeftFolder | bytes, spec: BaseModelSpec) -> Checked:
    if isinstance(content, bytes):
        artifact = decode(content, spec)
    else:
        artifact = read_peft((content.config, content.weights), spec)
    return Checked(str(artifact.kind), artifact.num_virtual_tokens, len(artifact.content))


def _check_file(content: bytes) -> Checked:
    header = read_header(content)
    if METADATA_KEY not in header.metadata:
        shapes = [list(entry.shape) for entry in header.tensors]
        return Checked(num_bytes=len(content), num_virtual_tokens=shapes[0][0] if shapes else None)
    manifest = Manifest.from_json(header.metadata[METADATA_KEY])
    return Checked(str(manifest.kind), manifest.num_virtual_tokens, len(content))


def _check_peft(folder: PeftFolder) -> Checked:
    config = parse_adapter_config(folder.config)
    header = read_header(folder.weights)
    if len(header.tensors) != 1:
        raise ArtifactError("tensor_count_mismatch", f"file has {len(header.tensors)} tensors, a prompt has 1")
    (entry,) = header.tensors
    for what, given, wanted in _expected(config, entry):
        if given != wanted:
            raise ArtifactError(
                "shape_mismatch", f"tensor {entry.name} has {given} {what}, adapter_config.json says {wanted}"
            )
    return Checked(str(config.kind), entry.shape[0], len(folder.weights))


def _expected(config: AdapterConfig, entry: TensorEntry) -> list[tuple[str, int, int]]:
    """Return (what, the file's, the configuration's) for everything that both say."""
    if len(entry.shape) != 2:
        raise ArtifactError("shape_mismatch", f"tensor {entry.name} has shape {list(entry.shape)}, expected [n, width]")
    rows, width = entry.shape
    pairs: list[tuple[str, int, int]] = []
    is_prefix = config.kind is PromptKind.PREFIX
    if config.num_virtual_tokens is not None:
        submodules = 1 if is_prefix else config.num_transformer_submodules
        pairs.append(("rows", rows, config.num_virtual_tokens * submodules))
    if config.token_dim is not None and not is_prefix:
        pairs.append(("columns", width, config.token_dim))
    if config.token_dim is not None and config.num_layers is not None and is_prefix:
        pairs.append(("columns", width, config.num_layers * 2 * config.token_dim))
    return pairs
