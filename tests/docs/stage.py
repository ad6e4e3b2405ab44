"""What pages take for granted: a clone as the working directory, a server on port 8000, the reader's own files."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from promptd.cli import app
from promptd.demo import DEMO_DATA_PATH, DEMO_MODEL_PATH, DEMO_PROMPTS_PATH
from tests.docs.pages import ROOT, Block
from tests.docs.shell import Terminal
from tests.ports import free_port

PAGES_ADDRESS = "127.0.0.1:8000"
PAGES_OWN_PORT = "8001"
"""Of a server that a page starts itself."""


def lay_out(folder: Path) -> None:
    """Fill a page's working directory: the clone's folders, and the files that pages call the reader's."""
    for name in ("server", "clients", "docker", "tests", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)
    rows = (DEMO_DATA_PATH / "snips-intent.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(rows[:60]))
    texts = [json.loads(row)["text"] for row in rows[60:64]]
    (folder / "questions.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "system_prompt.txt").write_text("You answer in one short sentence, and you are polite.\n")
    (folder / "path" / "to").mkdir(parents=True)
    for link in (folder / "path" / "to" / "model", folder / "base"):
        link.symlink_to(DEMO_MODEL_PATH)
    (folder / "superglue").symlink_to(ROOT / "tests" / "data")
    embeddings = load_file(DEMO_PROMPTS_PATH / "banking-topic.safetensors")["prompt_embeddings"]
    save_file({"prompt_embeddings": embeddings}, folder / "prompt.safetensors")  # without the template of its own task


def write_adapters(folder: Path, first: str, second: str, pickled: str) -> None:
    """Write PEFT folders of two users, and one that an old PEFT left as a pickle, as PEFT writes them."""
    for seed, name in enumerate((first, second)):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL_PATH)
        config = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=8, base_model_name_or_path=str(DEMO_MODEL_PATH)
        )
        get_peft_model(base, config).save_pretrained(str(folder / "adapters" / name))
    old, present = folder / "old" / pickled, folder / "adapters" / second
    old.mkdir(parents=True)
    torch.save(load_file(present / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_config.json").write_bytes((present / "adapter_config.json").read_bytes())


class Reader:
    """Someone who goes through one page from top to bottom, in one terminal and one Python."""

    def __init__(self, address: str, terminal: Terminal) -> None:
        """Begin with nothing; `address` is what the page calls 127.0.0.1:8000."""
        self._real = {PAGES_ADDRESS: address, PAGES_OWN_PORT: str(free_port())}
        self._terminal = terminal
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def follow(self, block: Block) -> None:
        """Run a block; fail where it fails, or prints something else than the page shows."""
        if block.language == "console":
            for command in block.commands():
                printed, status = self._terminal.run(self._to_real(command.text))
                shows = f"{block.place}: `{command.text}`"
                self._compare(shows, printed, command.shown.text, command.shown.matches)
                if status and not command.shown.text:  # a failure that a page shows is meant
                    pytest.fail(f"{shows} ended with status {status}:\n{printed}", pytrace=False)
        else:
            printed = self._run_python(block)
            self._compare(block.place, printed, block.shown.text, block.shown.matches)

    def _to_real(self, text: str) -> str:
        for shown_address, address in self._real.items():
            text = text.replace(shown_address, address)
        return text

    def _run_python(self, block: Block) -> str:
        output = io.StringIO()
        code = "\n" * block.line + self._to_real(block.text)  # tracebacks name the page's line
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                exec(compile(code, str(block.page), "exec"), self._names)  # noqa: S102 - our own pages
        except Exception:  # noqa: BLE001 - whatever a page raises is its failure
            pytest.fail(f"{block.place}\n{output.getvalue()}\n{traceback.format_exc(limit=-4)}", pytrace=False)
        return output.getvalue()

    def _compare(self, place: str, printed: str, shown: str, matches: Any) -> None:
        real = printed
        for shown_address, address in self._real.items():
            real = real.replace(address, shown_address)
        print(f"--- {place}\n{real}")  # what a page should show, to be seen with pytest's -s
        if not matches(real):
            pytest.fail(f"{place} shows\n{shown}\n--- but it printed\n{real}", pytrace=False)


def check_unrun(block: Block) -> None:
    """Check what can be checked without running: Python compiles, commands of ours exist and have these options."""
    if block.language == "python":
        compile(block.text, block.place, "exec")
        return
    for command in block.commands():
        words = shlex.split(command.text.replace("\\\n", " "), comments=True)
        while words and "=" in words[0]:
            words = words[1:]  # a variable for this command alone
        if words[:1] == ["promptd"]:
            _check_options(f"{block.place}: `{command.text}`", words[1:])


def _check_options(place: str, words: list[str]) -> None:
    at: Any = typer.main.get_command(app)
    for word in words:
        commands = getattr(at, "commands", {})
        if word in commands:
            at = commands[word]
        elif word.startswith("-"):
            known = {option for parameter in at.params for option in parameter.opts}
            assert word.split("=")[0] in known, f"{place}: {at.name} has no option {word}"
        else:
            assert not commands, f"{place}: there is no command {word!r}"
