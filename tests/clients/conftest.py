"""A real server, started as a user starts it, and real PEFT folders."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from promptd_client import Client
from transformers import AutoModelForCausalLM

KEY = "acme-key-0001"
START_SECONDS = 180

CONFIGS = {
    "soft": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@dataclass(frozen=True)
class Live:
    """A server's address and key."""

    url: str
    key: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self) -> Client:
        """Return a client with the key."""
        return Client(self.url, api_key=self.key, max_retries=0)

    @property
    def options(self) -> list[str]:
        """Options of a command that talks to it."""
        return ["--url", self.url, "--api-key", self.key]


def start_server(folder: Path, model: Path, **environment: str) -> Live:
    """Run `promptd serve` on a free port and wait until it says that it is ready."""
    log = folder / "serve.log"
    command = [sys.executable, "-m", "promptd.cli", "serve", "--model", str(model), "--port", "0"]
    command += ["--store", str(folder / "store"), "--drain-seconds", "2", "--served-model-name", "tiny"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"ready tiny at (http://\S+),", log.read_text())
        if found:
            return Live(found[1], KEY, process, log)
        time.sleep(0.05)
    process.kill()
    process.wait(60)
    raise RuntimeError(f"the server did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def live(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One server for all tests of this folder, with two tenants' keys. SIGTERM ends it in order: with status 0."""
    server = start_server(
        tmp_path_factory.mktemp("live"), tiny_models["llama"], PROMPTD_API_KEYS=f"acme:{KEY},other:other-key-0001"
    )
    yield server
    server.process.terminate()
    assert server.process.wait(timeout=60) == 0


@pytest.fixture(scope="session")
def adapters(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two PEFT folders, `soft` and `prefix`, saved by PEFT itself."""
    root = tmp_path_factory.mktemp("adapters")
    for number, (name, config) in enumerate(CONFIGS.items()):
        base = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
        torch.manual_seed(number)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT uses names that transformers will drop
            tuned = get_peft_model(base, copy.deepcopy(config))
            for parameter in tuned.prompt_encoder.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
            tuned.save_pretrained(root / name)
    return root
