"""Shared fixtures: one thread of torch, tiny models written once a session."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # for threads and processes that tests start, too: sums depend on it, bit for bit

import hypothesis
import pytest
import structlog
import torch

from tests import watchdog
from tests.family_models import ENCODERS, SEQ2SEQ, make_encoder_tokenizer, write_model
from tests.integration.server import demo_server
from tests.replicas import ReplicaForge
from tests.tiny_models import FAMILIES, make_tiny_model

torch.set_num_threads(1)
hypothesis.settings.register_profile("same", derandomize=True, database=None)  # `--hypothesis-profile default` draws
hypothesis.settings.load_profile("same")
structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # servers in threads would write into the report


def pytest_configure(config: pytest.Config) -> None:
    """A run ends, whatever hangs. What is collected lasts for the session: walking it finds no garbage."""
    config.pluginmanager.register(watchdog)
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A `long` test may take as long as it needs."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(0))


def pytest_collection_finish() -> None:
    """From here on there is garbage; looking for it does not walk the libraries."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """What is frozen would not be taken down with the interpreter, and libraries would call it leaked."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A whole run takes a process a core, up to four; one that was narrowed down takes one, which begins sooner."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    if not is_whole or config.option.markexpr not in config.getini("addopts"):
        return 0
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)


@pytest.fixture
def anyio_backend() -> str:
    """Run async tests on asyncio."""
    return "asyncio"


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is such a place, for what the store's own tests prove on a disk."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family name -> folder of a tiny random model."""
    root = tmp_path_factory.mktemp("models")
    return {family: make_tiny_model(root / f"tiny-{family}", family) for family in FAMILIES}


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> folder of a tiny random encoder."""
    root, tokenizer = tmp_path_factory.mktemp("encoders"), make_encoder_tokenizer()
    return {name: write_model(make, tokenizer, root / f"tiny-{name}") for name, make in ENCODERS.items()}


@pytest.fixture(scope="session")
def tiny_seq2seq(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> folder of a tiny random sequence-to-sequence model."""
    root, tokenizer = tmp_path_factory.mktemp("seq2seq"), make_encoder_tokenizer()
    return {name: write_model(make, tokenizer, root / f"tiny-{name}") for name, make in SEQ2SEQ.items()}


@pytest.fixture(scope="session")
def demo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`promptd serve` as a user starts it, in a process of its own: the demo and its prompts; it trains by default."""
    with demo_server(tmp_path_factory.mktemp("demo")) as url:
        yield url


@pytest.fixture(scope="session")
def forge(tiny_models: dict[str, Path]) -> Iterator[ReplicaForge]:
    """Servers on order, all of the tiny Llama."""
    made = ReplicaForge(tiny_models["llama"])
    yield made
    made.close()
