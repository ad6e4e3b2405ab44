"""Who is compared, and the parent's end of the pipe to each: a process that is stopped while others run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from tests.bench.versus.environments import CTRANSLATE2, OPENVINO, VLLM, Environment, UnavailableError

WORKERS = Path(__file__).parent / "workers"
PROJECT = Path(__file__).resolve().parents[3]
_END_SECONDS = 20


@dataclass(frozen=True)
class Contender:
    """One engine in one setting. Without an environment it runs in ours."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    environment: Environment | None = None
    kinds: frozenset[str] = frozenset({"none"})
    """Kinds of prompt whose rows it can answer."""
    is_continuous: bool = True
    """Takes requests while others run."""
    mixes: bool = True
    """Has all rows in one batch; otherwise one request is answered after the other, and few are asked."""
    is_exact: bool = True
    """Computes in float32, so that its greedy answers must be those of the others."""
    converts: bool = False
    """Needs a folder of its own format, which its script writes."""
    variables: Mapping[str, str] = field(default_factory=dict)

    def prepare(self, model: Path, root: Path) -> tuple[Path, Path]:
        """Install and convert what is missing; return (interpreter, model folder). Raises `UnavailableError`."""
        python = Path(sys.executable) if self.environment is None else self.environment.python(root / "environments")
        if not self.converts:
            return python, model
        out = root / "converted" / f"{self.script.removesuffix('.py')}-{model.name}"
        if not out.exists():
            print(f"    converting {model.name} for {self.name}", flush=True)
            partial = out.with_name(f"{out.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            command = [str(python), str(WORKERS / self.script), "convert", str(model.resolve()), str(partial.resolve())]
            ended = subprocess.run(command, capture_output=True, text=True, env=self._variables(1))
            if ended.returncode:
                raise UnavailableError(f"conversion failed: {ended.stderr.strip().splitlines()[-1:]}")
            partial.rename(out)
        return python, out

    def start(self, model: Path, root: Path, threads: int) -> Running:
        """Start its process and load the model. Raises `UnavailableError` where that cannot be."""
        python, folder = self.prepare(model, root)
        command = [str(python), str(WORKERS / self.script), *self.arguments]
        log = root / "logs" / f"{'-'.join([self.script.removesuffix('.py'), *self.arguments])}.log"
        running = Running(self.name, command, self._variables(threads), log)
        try:
            running.ask("load", model=str(folder.resolve()), threads=threads)
        except RuntimeError as error:
            running.close()
            raise UnavailableError(str(error)) from None
        running.start_seconds = time.perf_counter() - running.began
        return running

    def _variables(self, threads: int) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PROMPTD_", "PYTHON"))}
        own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.environment is None:
            parts = [PROJECT / part for part in ("server", "prompt_store", "clients/python", "")]
            own["PYTHONPATH"] = os.pathsep.join(map(str, parts))
        return {**kept, **own, **self.variables}


class Running:
    """A contender's process."""

    def __init__(self, name: str, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.start_seconds = 0.0
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a+b")
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(variables),
            text=True,
            cwd=tempfile.gettempdir(),  # a folder without modules of ours
        )

    @property
    def pid(self) -> int:
        """Of the process that answers."""
        return self._process.pid

    def ask(self, what: str, **fields: Any) -> Any:
        """Send one command and wait for its answer. Raises `RuntimeError` with the worker's reason."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError(f"{self.name} has no pipes")
        with contextlib.suppress(BrokenPipeError):  # the answer's absence says it
            stdin.write(json.dumps({"do": what, **fields}) + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line:
            self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
            said = self._log.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}: {' '.join(said[-2:])}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer["answer"]

    def pause(self) -> None:
        """Stop every process of it: some engines spin while they wait."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def peak_bytes(self) -> int | None:
        """Sum of the high-water marks of its processes' resident memory; None where the system does not tell."""
        marks = []
        for process in self._tree():
            try:
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            except OSError:
                continue
            marks += [int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")]
        return sum(marks) or None

    def close(self) -> None:
        """End it, and all that it started."""
        self.resume()
        tree = self._tree()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _tree(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self._process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


OURS = Contender("promptd", "of_promptd.py", kinds=frozenset({"none", "soft", "prefix"}))
CONTROL = replace(OURS, name="promptd, again")
"""The same in a second process: how far from 1 its ratio is says how far any ratio is off by chance."""
QUANTIZED = replace(OURS, name="promptd, int8", arguments=("--quantization", "int8"), is_exact=False)
HALF = replace(OURS, name="promptd, bfloat16", arguments=("--dtype", "bfloat16"), is_exact=False)
VLLM_FLOAT32 = Contender("vLLM", "of_vllm.py", ("float32",), environment=VLLM, kinds=frozenset({"none", "soft"}))
OPENVINO_FLOAT32 = Contender("OpenVINO GenAI", "of_openvino.py", ("f32",), environment=OPENVINO, converts=True)
STACKED = Contender(
    "transformers, static batches",
    "of_transformers.py",
    ("stacked",),
    kinds=frozenset({"none", "soft"}),
    is_continuous=False,
)
CONTINUOUS = Contender("transformers, continuous batching", "of_transformers.py", ("continuous",), is_continuous=False)
"""`generate_batch` takes all requests at once."""
PEFT = Contender(
    "PEFT, one at a time",
    "of_transformers.py",
    ("peft",),
    kinds=frozenset({"none", "soft", "prefix"}),
    is_continuous=False,
    mixes=False,
)
PEERS = (
    HALF,
    QUANTIZED,
    PEFT,
    STACKED,
    CONTINUOUS,
    VLLM_FLOAT32,
    replace(VLLM_FLOAT32, name="vLLM, bfloat16", arguments=("bfloat16",), is_exact=False),
    Contender(
        "CTranslate2", "of_ctranslate2.py", ("float32",), environment=CTRANSLATE2, is_continuous=False, converts=True
    ),
    Contender(
        "CTranslate2, int8",
        "of_ctranslate2.py",
        ("int8_float32",),
        environment=CTRANSLATE2,
        is_continuous=False,
        is_exact=False,
        converts=True,
    ),
    OPENVINO_FLOAT32,
    replace(OPENVINO_FLOAT32, name="OpenVINO GenAI, bfloat16", arguments=("bf16",), is_exact=False),
)
CONTENDERS = {each.name: each for each in (OURS, CONTROL, *PEERS)}


def prepare_all(models: Sequence[Path], names: Sequence[str], root: Path) -> None:
    """Install and convert what the named peers need, trying again what failed before; say what cannot be."""
    for name in names:
        contender = CONTENDERS[name]
        if contender.environment is not None:
            contender.environment.forget_failure(root / "environments")
        for model in models:
            try:
                contender.prepare(model, root)
            except UnavailableError as reason:
                print(f"    {name}, {model.name}: {reason}", flush=True)
