"""The classification head that may come with a prompt for an encoder: names, shapes, PEFT's way to write it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from promptd_store.artifact import HEAD_PREFIX, BaseModelSpec
from promptd_store.errors import ArtifactError
from promptd_store.manifest import Manifest

MAX_CLASSES = 4096

_LAYOUTS = (
    {"weight"},
    {"weight", "bias"},
    {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"},
)
"""One linear layer (BERT's), or two with a tanh between them (RoBERTa's)."""
_PARTS = "|".join(re.escape(part) for part in sorted(set().union(*_LAYOUTS)))
_PEFT_NAME = re.compile(rf"base_model\.(?:classifier|score)\.({_PARTS})")
_OWN_NAME = re.compile(rf"{re.escape(HEAD_PREFIX)}({_PARTS})")


def is_head(name: str) -> bool:
    """Whether a tensor is part of a head, by our name of it."""
    return _OWN_NAME.fullmatch(name) is not None


def name_from_peft(name: str) -> str | None:
    """Return our name of a tensor that PEFT saves of a classifier (`modules_to_save`); None for any other name."""
    match = _PEFT_NAME.fullmatch(name)
    return HEAD_PREFIX + match.group(1) if match else None


def name_to_peft(name: str) -> str:
    """Return PEFT's name of a head's tensor."""
    return "base_model.classifier." + name.removeprefix(HEAD_PREFIX)


def check_head(shapes: Mapping[str, tuple[int, ...]], spec: BaseModelSpec) -> None:
    """Refuse a head that this base model cannot use; no tensors are no head."""
    if not shapes:
        return
    first = min(shapes)
    if not spec.takes_head:
        raise ArtifactError(
            "head_not_supported", f"{spec.architecture} takes no classification head, the file has {first}", first
        )
    parts = {name.removeprefix(HEAD_PREFIX): tuple(shape) for name, shape in shapes.items()}
    if set(parts) not in _LAYOUTS:
        raise ArtifactError(
            "tensor_name_not_allowed",
            f"a head has the tensors {[sorted(layout) for layout in _LAYOUTS]}, each behind {HEAD_PREFIX!r}; "
            f"the file has {sorted(shapes)}",
            first,
        )
    hidden = spec.hidden_size
    last = "out_proj." if "out_proj.weight" in parts else ""
    count = parts[f"{last}weight"][0] if parts[f"{last}weight"] else 0
    if not 2 <= count <= MAX_CLASSES:
        raise ArtifactError(
            "shape_mismatch", f"the head tells {count} classes apart, 2 to {MAX_CLASSES} are allowed", first
        )
    wanted = {"dense.weight": (hidden, hidden), "dense.bias": (hidden,)}
    wanted |= {f"{last}weight": (count, hidden), f"{last}bias": (count,)}
    for name, shape in parts.items():
        if shape != wanted[name]:
            raise ArtifactError(
                "shape_mismatch",
                f"tensor {HEAD_PREFIX}{name} has shape {list(shape)}, this base model needs {list(wanted[name])}",
                HEAD_PREFIX + name,
            )


def check_labels(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse names of classes that are not as many as the head's rows."""
    rows = [
        shape[0] for name, shape in shapes.items() if name.removeprefix(HEAD_PREFIX) in ("weight", "out_proj.weight")
    ]
    if manifest.labels is not None and rows != [len(manifest.labels)]:
        raise ArtifactError(
            "manifest_invalid",
            f"labels names {len(manifest.labels)} classes, the head has {rows[0] if rows else 'none'}",
            "labels",
        )
