"""A real server in a process of its own, and real PEFT folders."""

from __future__ import annotations

import copy
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from promptd_client import Client
from transformers import AutoModelForCausalLM

from tests.replicas import ReplicaForge, running_replicas

KEY = "acme-key-0001"

CONFIGS = {
    "soft": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@dataclass(frozen=True)
class Live:
    """A server's address and key."""

    url: str
    key: str

    def client(self) -> Client:
        """Return a client with the key."""
        return Client(self.url, api_key=self.key, max_retries=0)

    @property
    def options(self) -> list[str]:
        """Options of a command that talks to it."""
        return ["--url", self.url, "--api-key", self.key]


@pytest.fixture(scope="session")
def live(forge: ReplicaForge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One server for all tests of this folder, with two tenants' keys. SIGTERM ends it in order: with status 0."""
    folder = tmp_path_factory.mktemp("live")
    settings = {"served_model_name": "tiny", "training": "inline", "drain_seconds": 2, "leave_seconds": 0}
    keys = f"acme:{KEY},other:other-key-0001"
    with running_replicas(forge, folder, str(folder / "store"), 1, api_keys=keys, **settings) as (server,):
        yield Live(server.url, KEY)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


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
