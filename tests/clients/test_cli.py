"""The command line: help, settings, doctor, and the prompts commands against a real server."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner, Result

from promptd.cli import app
from promptd.commands.launch import listen
from promptd.commands.serve import serve
from promptd.settings import Settings
from tests.clients.conftest import Live
from tests.ports import free_port

COMMANDS = [
    [],
    ["serve"],
    ["doctor"],
    ["top"],
    ["convert"],
    ["eval"],
    ["prompts"],
    ["train"],
    ["jobs"],
    ["keys"],
    ["apply"],
    ["drain"],
    ["tenants"],
    *(["tenants", name] for name in ("show", "erase")),
    ["users"],
    ["users", "erase"],
    *(["keys", name] for name in ("create", "ls", "rotate", "revoke")),
    *(["jobs", name] for name in ("create", "ls", "show", "watch", "cancel", "pause", "resume", "rm")),
    *(
        ["prompts", name]
        for name in ("ls", "show", "write", "push", "pull", "rm", "rollback", "verify", "share", "unshare")
    ),
]
HEAVY = ("torch", "transformers", "fastapi", "pydantic", "httpx", "promptd_store", "numpy")


def run(*arguments: str, input: str | None = None) -> Result:
    """Run `promptd` in this process."""
    return CliRunner().invoke(app, list(arguments), input=input)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: list[str]) -> None:
    """Every command explains itself, and shows its options whole."""
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output
    assert not re.search(r"--[a-z-]+…", result.output)


def test_help_is_light() -> None:
    """`promptd --help` imports none of the heavy libraries, and so answers at once."""
    code = (
        "import sys; sys.argv = ['promptd', '--help']\n"
        "from promptd.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    """`--version` prints the version and nothing else."""
    import promptd

    assert run("--version").output.strip() == promptd.__version__


def test_serve_takes_every_setting() -> None:
    """Each setting is an option of `promptd serve`, but a worker's own and keys: lists of processes show those."""
    options = inspect.signature(serve).parameters
    assert set(options) == set(Settings.model_fields) - {"admin_key", "api_keys", "key_secret", "metrics_port"}
    assert all(option.default is None for option in options.values())


def test_serve_names_a_bad_setting() -> None:
    """A value that cannot be is refused before anything is loaded, by the name of its option."""
    result = run("serve", "--port", "70000")
    assert result.exit_code == 1 and "--port" in result.stderr and "65535" in result.stderr


def test_serve_refuses_to_be_open_to_others() -> None:
    """Without keys, nothing but loopback is listened on."""
    result = run("serve", "--host", "0.0.0.0", "--port", "0")  # noqa: S104 - that it is refused is the test
    assert result.exit_code == 1 and "PROMPTD_API_KEYS" in result.stderr


@pytest.mark.parametrize(
    ("keys", "host", "said"),
    [
        ({"PROMPTD_ADMIN_KEY": "short"}, "127.0.0.1", "PROMPTD_ADMIN_KEY has fewer than 8 characters"),
        ({"PROMPTD_API_KEYS": "acme:short"}, "127.0.0.1", "at least 8 characters"),
        ({"PROMPTD_API_KEYS": "public:key-of-acme"}, "127.0.0.1", "entry 1 names no tenant"),
        ({"PROMPTD_API_KEYS": "acme:key-of-acme,a b:key-of-b"}, "127.0.0.1", "entry 2 names no tenant"),
        (
            {"PROMPTD_API_KEYS": "acme:key-of-all", "PROMPTD_ADMIN_KEY": "key-of-all"},
            "127.0.0.1",
            "one secret for two purposes",
        ),
        ({"PROMPTD_ADMIN_KEY": "change-me-too"}, "0.0.0.0", "as in an example"),  # noqa: S104 - it is refused
        ({"PROMPTD_API_KEYS": "acme:change-me-please"}, "0.0.0.0", "as in an example"),  # noqa: S104
    ],
)
def test_serve_refuses_keys_that_are_easily_guessed(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, str], host: str, said: str
) -> None:
    """One line that says which and why, and not the key; nothing is loaded. (An example's key on loopback is fine.)"""
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    result = run("serve", "--host", host, "--port", "0")
    assert result.exit_code == 1 and said in " ".join(result.stderr.split())
    assert "loading" not in result.stderr and all(value not in result.stderr for value in keys.values())
    monkeypatch.setenv("PROMPTD_ADMIN_KEY", "change-me-too")
    monkeypatch.delenv("PROMPTD_API_KEYS", raising=False)
    assert Settings().admin_key is not None


def test_serve_knows_a_taken_port_at_once() -> None:
    """A taken port is said so before the model is loaded."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = run("serve", "--port", str(other.getsockname()[1]))
    assert result.exit_code == 1 and "in use" in result.stderr and "loading" not in result.stderr


def test_small_answers_are_sent_without_delay() -> None:
    """Connections to what `promptd serve` listens on have TCP_NODELAY: no answer waits for an acknowledgement. The
    control: a listener that does not name its protocol, which is Python's default."""

    async def has_no_delay(listener: socket.socket) -> bool:
        accepted = asyncio.get_running_loop().create_future()
        server = await asyncio.start_server(lambda reader, writer: accepted.set_result(writer), sock=listener)
        async with server:
            _, ours = await asyncio.open_connection(*listener.getsockname())
            theirs = await accepted
            option: int = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for writer in (ours, theirs):
                writer.close()
                await writer.wait_closed()
        return option != 0

    control = socket.socket()
    control.bind(("127.0.0.1", 0))
    assert asyncio.run(has_no_delay(listen("127.0.0.1", 0)))
    assert not asyncio.run(has_no_delay(control))


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Undo what `promptd serve` does to this process's logs."""
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:], root.level = handlers, level
    structlog.configure(**config)


@pytest.mark.usefixtures("logging_restored")
def test_serve_refuses_a_model_that_is_not_there(tmp_path: Path) -> None:
    """A wrong path ends in one line, not in a traceback."""
    result = run("serve", "--model", str(tmp_path / "nothing"), "--store", str(tmp_path / "s"), "--port", "0")
    assert result.exit_code == 1 and "nothing" in result.stderr and "Traceback" not in result.output


def test_doctor_finds_nothing_wrong(tiny_models: dict[str, Path], tmp_path: Path, live: Live) -> None:
    """On a machine that can serve, every line says ok."""
    result = run("doctor", "--model", str(tiny_models["llama"]), "--store", str(tmp_path), "--port", "0", *live.options)
    lines = [line.split() for line in result.output.splitlines()]
    assert result.exit_code == 0, result.output
    assert [words[1] for words in lines] == ["python", "torch", "device", "kernels", "model", "store", "port", "server"]
    assert {words[0] for words in lines} <= {"ok", "warn"}


def test_doctor_finds_what_is_wrong(tmp_path: Path) -> None:
    """Each thing that would keep the server from starting is a line of its own, and the status says so."""
    (tmp_path / "file").write_text("")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = run(
            "doctor", "--model", str(tmp_path), "--store", str(tmp_path / "file" / "store"), "--port", str(port)
        )
    failed = [line.split()[1] for line in result.output.splitlines() if line.startswith("FAIL")]
    assert result.exit_code == 1 and failed == ["model", "store", "port"]


def test_doctor_names_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line and no traceback, whichever command reads it."""
    monkeypatch.setenv("PROMPTD_PORT", "tcp://10.96.0.1:80")
    result = run("doctor")
    assert result.exit_code == 1 and "--port: Kubernetes" in result.stderr and "Traceback" not in result.output


def test_no_server_is_one_line(tmp_path: Path) -> None:
    """Without a server the command says where it looked and what to do."""
    url = f"http://127.0.0.1:{free_port()}"
    result = run("prompts", "ls", "--url", url)
    assert result.exit_code == 1 and url in result.stderr and "promptd serve" in result.stderr


def test_a_wrong_key_is_said_so(live: Live) -> None:
    """The server's code and message reach the terminal."""
    result = run("prompts", "ls", "--url", live.url, "--api-key", "wrong-key-1")
    assert result.exit_code == 1 and "invalid_api_key" in result.stderr


def test_a_prompts_life(live: Live, adapters: Path, tmp_path: Path) -> None:
    """Push, list, show, pull, push another version, roll back, remove."""
    pushed = run(
        "prompts", "push", str(adapters / "soft"), "--name", "life", "--no-resume", *_state(tmp_path), *live.options
    )
    assert pushed.exit_code == 0 and "life" in pushed.output and "7 tokens" in pushed.output

    listed = [json.loads(line) for line in run("prompts", "ls", "--json", *live.options).output.splitlines()]
    assert [one["kind"] for one in listed if one["id"] == "life"] == ["soft"]
    assert "life" in run("prompts", "ls", *live.options).output

    pulled = run("prompts", "pull", "life", "-o", str(tmp_path / "pulled"), *live.options)
    assert pulled.exit_code == 0
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "pulled" / file).read_bytes() == (adapters / "soft" / file).read_bytes()
    assert run("prompts", "pull", "life", "-o", str(tmp_path / "pulled"), *live.options).exit_code == 1

    run("prompts", "push", str(adapters / "prefix"), "--name", "life", *_state(tmp_path), *live.options)
    shown = run("prompts", "show", "life", *live.options).output
    assert "v2" in shown and "v1" in shown and "prefix" in shown
    back = run("prompts", "rollback", "life", "--to", "1", *live.options)
    assert back.exit_code == 0 and "v1" in back.output

    assert run("prompts", "rm", "life", *live.options, input="n\n").exit_code == 1
    assert run("prompts", "rm", "life", *live.options, input="y\n").exit_code == 0
    gone = run("prompts", "show", "life", *live.options)
    assert gone.exit_code == 1 and "prompt_not_found" in gone.stderr


def _state(folder: Path) -> list[str]:
    return ["--state", str(folder / "state.jsonl")]


def test_a_text_from_the_terminal(live: Live, tmp_path: Path) -> None:
    """A file or the standard input becomes a prompt; what is no text is told."""
    (tmp_path / "manual.txt").write_text("the quick brown fox")
    for source, text in ((str(tmp_path / "manual.txt"), None), ("-", "the quick brown fox")):
        made = run("prompts", "write", "manual", source, *live.options, input=text)
        assert made.exit_code == 0 and made.output.startswith("manual is v1  sha256:"), made.output
    assert "the quick brown fox" in run("prompts", "show", "manual", *live.options).output
    (tmp_path / "bytes").write_bytes(b"\xff")
    bad = run("prompts", "write", "manual", str(tmp_path / "bytes"), *live.options)
    assert bad.exit_code == 1 and "'utf-8' codec" in bad.output
    assert run("prompts", "rm", "manual", "--yes", *live.options).exit_code == 0


def test_facts_are_written_for_people() -> None:
    """Nested facts get lines of their own, plain ones stand side by side, and nothing is left out."""
    from promptd.commands.prompts import _in_lines

    assert _in_lines({"scores": {"after": {"loss": 0.12345, "rows": 3}, "before": {"loss": 2}}, "seed": 1}) == [
        "seed 1",
        "scores:",
        "  after: loss 0.1235, rows 3",
        "  before: loss 2",
    ]
    assert _in_lines([{"input": "x"}, {"input": "y", "more": None}]) == ['input "x"', 'input "y"']
    assert _in_lines(["a", 1.5]) == ['"a", 1.5']
