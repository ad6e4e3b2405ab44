"""A checkpoint's weights in float32, whatever it holds, for converters that would keep the dtype they find."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def write_float32(model: Path, out: Path) -> None:
    """Write the folder of a model once more."""
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
            save_file(tensors, out / file.name, metadata={"format": "pt"})
        elif file.name == "config.json":
            config = json.loads(file.read_text(encoding="utf-8"))
            config.update({name: "float32" for name in ("dtype", "torch_dtype") if name in config})
            (out / file.name).write_text(json.dumps(config), encoding="utf-8")
        else:
            shutil.copy(file, out)
