"""What the packages never do: unpickle, evaluate, start a shell, validate by `assert`. Read off their syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("server/promptd", "prompt_store/promptd_store", "clients/python/promptd_client")
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jinja2", "urllib.request"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load",
    "numpy.load", "np.load", "jinja2.Template", "subprocess.getoutput",
}  # fmt: skip
SERVING = ("api", "engine", "modeling", "tenancy", "jobs", "training")
CLIENTS = {"httpx", "requests", "aiohttp", "urllib3", "subprocess", "ctypes"}
"""Nothing that serves reaches out, or starts anything."""
ALLOWED = {
    ("server/promptd/demo/pretrain.py", "torch.load"),  # how the demo's model was made: its own checkpoints
    # One model over several devices: its own followers, with arguments of its own.
    ("server/promptd/modeling/tensor_parallel.py", "subprocess"),
    # Our own kernels, built by the machine's compiler from C that lies beside them, and called in this process.
    ("server/promptd/modeling/kernels/__init__.py", "subprocess"),
    ("server/promptd/modeling/kernels/__init__.py", "ctypes"),
    ("server/promptd/modeling/activations.py", "ctypes"),
    ("server/promptd/modeling/compiled_linear.py", "ctypes"),
    ("server/promptd/modeling/decode_kernel.py", "ctypes"),
    ("server/promptd/modeling/norms.py", "ctypes"),
    ("server/promptd/modeling/prefill_kernel.py", "ctypes"),
    ("server/promptd/modeling/freed_memory.py", "ctypes"),
    ("server/promptd/modeling/integer_product.py", "ctypes"),
    ("server/promptd/modeling/quantized_linear.py", "ctypes"),
    # `promptd convert`, on a person's own files and machine: tensors alone (weights_only, allow_pickle=False).
    ("server/promptd/commands/old_formats.py", "torch.load"),
    ("server/promptd/commands/old_formats.py", "np.load"),
}


def dotted(node: ast.expr) -> str:
    """The name that is called, as it is written."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "?", *reversed(parts)])


def faults(source: str, path: str) -> Iterator[str]:
    """Yield what a file should not have."""
    serving = any(path.startswith(f"server/promptd/{part}/") for part in SERVING)
    serving = serving or path.startswith("prompt_store/promptd_store/")
    banned = MODULES | (CLIENTS if serving else set())
    for node in ast.walk(ast.parse(source)):
        found = ""
        if isinstance(node, ast.Assert):
            found = "assert"
        elif isinstance(node, ast.Import):
            found = next((one.name for one in node.names if one.name in banned), "")
        elif isinstance(node, ast.ImportFrom) and node.module in banned:
            found = str(node.module)
        elif isinstance(node, ast.Call):
            found = name if (name := dotted(node.func)) in CALLS else ""
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true:
                    found = str(keyword.arg)
        if found and (path, found) not in ALLOWED:
            yield f"{path}:{getattr(node, 'lineno', 0)}: {found}"


def test_the_packages_do_none_of_it() -> None:
    """Every file of the three packages."""
    found: list[str] = []
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    for file in files:
        found += faults(file.read_text(), str(file.relative_to(ROOT)))
    assert len(files) > 200
    assert found == []


def test_control_each_is_found() -> None:
    """The scan sees what it looks for."""
    for line in (
        "import pickle", "from pickle import loads", "torch.load(x)", "eval(x)", "assert x", "run(x, shell=True)",
        "load(x, trust_remote_code=True)", "yaml.load(x)",
    ):  # fmt: skip
        assert len(list(faults(line, "server/promptd/app.py"))) == 1, line
    assert list(faults("import httpx", "server/promptd/api/x.py")) and not list(faults("import httpx", "server/x.py"))
