"""What is freed is used again as it is; what is loaded does not hold the file that it came from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from promptd.modeling import freed_memory
from tests.family_models import SEQ2SEQ, write_model
from tests.tiny_models import make_tiny_model, make_tokenizer

PROGRAM = """
import resource, runpy, sys
module = runpy.run_path(sys.argv[1])
if sys.argv[2] == "kept" and not module["keep_freed_memory"]():
    sys.exit("this C library cannot")
for number in range(8):
    if number == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [b"x" * (16 << 20) for _ in range(4)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that a process is given for the last four of eight times that it takes and frees 64 MiB."""
    if not sys.platform.startswith("linux"):
        pytest.skip("page faults are counted on Linux")
    command = [sys.executable, "-c", PROGRAM, freed_memory.__file__, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "cannot" in done.stderr:
        pytest.skip("this C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_used_again() -> None:
    """Hardly a page is asked for again; the control is the C library as it is, which gives memory back each time."""
    assert 5 * faults("kept") < faults("given back")


LOADED = """
import sys
from pathlib import Path
from promptd.modeling import load, load_model
if sys.argv[2] == "kept":
    load.let_files_go = lambda model: None
model = load_model(sys.argv[1], dtype=sys.argv[3], quantization=sys.argv[4])
assert load.can_compile(model.dtype), "no compiler"
print(sum("model.safetensors" in line for line in Path("/proc/self/maps").read_text().splitlines()))
"""


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("float32", "int8"), ("bfloat16", "none")])
def test_a_loaded_model_does_not_hold_its_file(dtype: str, quantization: str, family: str, tmp_path: Path) -> None:
    """All of it would stay mapped, as in the control, where what is not packed is not copied."""
    if not sys.platform.startswith("linux"):
        pytest.skip("mappings are listed on Linux")
    if family == "llama":
        folder = make_tiny_model(tmp_path, family)
    else:
        folder = write_model(SEQ2SEQ[family], make_tokenizer(), tmp_path)
    if dtype == "bfloat16":
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone().bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    counts = []
    for how in ("kept", "let go"):
        command = [sys.executable, "-c", LOADED, str(folder), how, dtype, quantization]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        counts.append(int(done.stdout))
    assert counts[0] > 0 == counts[1]
