"""The comparison with peers: its clock, its processes, its environments, and a whole run at tiny sizes."""

from __future__ import annotations

import itertools
import shutil
import sys
import zipfile
from collections import deque
from pathlib import Path

import psutil
import pytest

from tests.bench.__main__ import main
from tests.bench.versus import environments
from tests.bench.versus.contenders import CONTENDERS, CONTROL, PEFT, PROJECT, WORKERS, Running
from tests.bench.versus.environments import Environment, UnavailableError
from tests.bench.versus.workers import loop
from tests.patience import until

PAGE = PROJECT / "server" / "docs" / "performance.md"
ECHO = """
import os, sys
sys.path.insert(0, {workers!r})
import loop
def fail(): raise ValueError("no such thing")
def die(): print("last words", file=sys.stderr); sys.stderr.flush(); os._exit(3)
loop.serve({{"double": lambda number: print("noise", flush=True) or 2 * number, "fail": fail, "die": die}})
"""


class OneTokenAStep:
    """Every running request gets one token a step: its own number."""

    def __init__(self) -> None:
        self.running: dict[int, int] = {}
        self.most = 0

    def add(self, number: int, request: loop.Request) -> None:
        """Take a request."""
        self.running[number] = request["max_tokens"]
        self.most = max(self.most, len(self.running))

    def step(self) -> list[tuple[int, list[int]]]:
        """Return a token of each."""
        made = [(number, [number]) for number in self.running]
        self.running = {number: left - 1 for number, left in self.running.items() if left > 1}
        return made


def test_requests_are_sent_when_due_and_no_more_than_allowed() -> None:
    """All are answered, two at a time, none before its moment; latencies count from that moment."""
    engine = OneTokenAStep()
    moments = (0.02, 0.0, 0.0, 0.01, 0.0)
    requests = [{"ids": [1], "max_tokens": 3 + at, "prompt": None, "at": moment} for at, moment in enumerate(moments)]
    found = loop.drive(engine, requests, 2)
    assert found["answers"] == [[at] * (3 + at) for at in range(5)]
    assert engine.most == 2
    assert all(later >= earlier >= 0 for own in found["times"] for earlier, later in itertools.pairwise(own))
    assert loop.drive(OneTokenAStep(), requests, 5)["answers"] == found["answers"]


def test_static_batches_are_of_the_size_asked() -> None:
    """Batches of two, the last of one."""
    sizes: deque[int] = deque()

    class Batches:
        def generate(self, requests: list[loop.Request]) -> list[list[int]]:
            sizes.append(len(requests))
            return [[request["max_tokens"]] for request in requests]

    asked = [{"ids": [1], "max_tokens": at, "prompt": None, "at": 0.0} for at in range(5)]
    assert loop.in_batches(Batches(), asked, 2)["answers"] == [[at] for at in range(5)]
    assert list(sizes) == [2, 2, 1]


def test_a_worker_answers_fails_and_dies_with_a_reason(tmp_path: Path) -> None:
    """What it prints is not an answer; its errors and its death carry its words; it is stopped while others run."""
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(workers=str(WORKERS)))
    running = Running("echo", [sys.executable, str(script)], {}, tmp_path / "echo.log")
    try:
        assert running.ask("double", number=21) == 42
        with pytest.raises(RuntimeError, match="echo: ValueError: no such thing"):
            running.ask("fail")
        running.pause()
        until(lambda: psutil.Process(running.pid).status() == psutil.STATUS_STOPPED)  # the signal is on its way
        running.resume()
        assert running.ask("double", number=2) == 4
        assert (running.peak_bytes() or 1 << 20) >= 1 << 20
        with pytest.raises(RuntimeError, match=r"echo ended with 3: .*last words"):
            running.ask("die")
    finally:
        running.close()


def test_an_environment_is_made_once_and_says_why_it_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packages are there and ours are not; it stays while its pins stay; a failure is remembered until told."""
    monkeypatch.setattr(environments, "_reaches", lambda host: False)
    wheel = _wheel(tmp_path)
    good = Environment("good", (str(wheel),))
    python = good.python(tmp_path)
    environments._called([str(python), "-c", "import lone"])
    with pytest.raises(UnavailableError, match="torch"):
        environments._called([str(python), "-c", "import torch"])
    made = (tmp_path / "good" / "installed.json").stat().st_mtime_ns
    assert good.python(tmp_path) == python
    assert (tmp_path / "good" / "installed.json").stat().st_mtime_ns == made
    bad = Environment("bad", (str(tmp_path / "absent-1.0-py3-none-any.whl"),))
    with pytest.raises(UnavailableError, match="absent") as first:
        bad.python(tmp_path)
    shutil.copy(wheel, bad.packages[0])
    with pytest.raises(UnavailableError) as again:  # not tried
        bad.python(tmp_path)
    assert str(again.value) == str(first.value)
    bad.forget_failure(tmp_path)
    assert not (tmp_path / "bad" / "failed.json").exists()


def _wheel(folder: Path) -> Path:
    """The smallest package that pip installs."""
    path, info = folder / "lone-1.0-py3-none-any.whl", "lone-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("lone.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: lone\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"lone.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def _run(folder: Path, *arguments: str) -> dict[str, str]:
    page = folder / "page.md"
    shutil.copy(PAGE, page)
    main([*arguments, "--smoke", "--threads", "1", "--folder", str(folder), "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text != PAGE.read_text(encoding="utf-8")
    assert {"rates.png", "memory.png", "results.json"} <= {file.name for file in (folder / "page").iterdir()}
    lines = text.splitlines()
    return {name: "\n".join(line for line in lines if line.startswith(f"| tiny | {name} |")) for name in CONTENDERS}


@pytest.mark.long
def test_a_whole_run_fills_the_page_and_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against PEFT: soft prompts, prefixes and both mixed, all greedy answers equal. A peer that cannot be had is
    skipped with its reason. A second run measures nothing."""

    def absent(self: Environment, root: Path) -> Path:
        raise UnavailableError("no such index")

    monkeypatch.setattr(Environment, "python", absent)
    arguments = ("versus", "--peers", PEFT.name, "vLLM", "--workloads", "w1-new", "w1p", "w1m")
    shown = _run(tmp_path, *arguments)
    assert shown[PEFT.name].count("100.0% / 100.0%") == 3
    assert "no such index" in shown["vLLM"]
    noted = (tmp_path / "results.json").read_text()
    assert f'"versus/tiny/w1m/{PEFT.name}/ours"' in noted
    assert f'"versus/tiny/w1/{PEFT.name}/ours"' not in noted
    monkeypatch.setattr(Running, "ask", None)
    _run(tmp_path, *(each for each in arguments if each != "vLLM"))
    assert (tmp_path / "results.json").read_text() == noted


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_contender_that_needs_no_environment(tmp_path: Path) -> None:
    """All workloads, random arrivals and many stored prompts; whoever answers the same asks gives the same tokens."""
    peers = [name for name, each in CONTENDERS.items() if each.environment is None and name != "promptd"]
    shown = _run(tmp_path, "versus", "load", "stored", "--peers", *peers)
    assert shown[CONTROL.name].count("100.0% / 100.0%") == 8
    assert all(shown[name].count("100.0% / 100.0%") >= 3 for name in peers)
