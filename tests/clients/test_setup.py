"""The shell side of the two commands: when they install, with which Python, and what they say when they cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("server/run", "server/setup.sh", "tests/run", ".ci/run")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of nothing but what the set-up reads."""
    (tmp_path / "server").mkdir()
    for name in ("server/setup.sh", "server/constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def _bash(project: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source server/setup.sh; {code}"],
        cwd=project,
        env={**{name: value for name, value in os.environ.items() if name != "PROMPTD_PYTHON"}, **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def _installed(project: Path, extra: str) -> None:
    """Make a .venv that looks as the set-up leaves it."""
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to(sys.executable)
    stamp = _bash(project, "promptd_stamp").stdout
    (project / ".venv" / f".promptd-{extra}").write_text(stamp)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script: str) -> None:
    """Every script is valid bash, and those that are run can be."""
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=60)
    assert script.endswith(".sh") or os.access(ROOT / script, os.X_OK)


def test_a_second_start_installs_nothing(project: Path) -> None:
    """Where this state of the project is installed already, the set-up returns at once and in silence."""
    _installed(project, "server")
    done = _bash(project, "promptd_setup server; echo done")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("installed", "wanted", "is_enough"),
    [("server", "server", True), ("dev", "server", True), ("dev", "dev", True), ("server", "dev", False)],
)
def test_what_was_installed_counts(project: Path, installed: str, wanted: str, is_enough: bool) -> None:
    """The developers' set-up contains the server's, but not the other way round."""
    _installed(project, installed)
    assert (_bash(project, f"promptd_is_set_up {wanted}").returncode == 0) == is_enough


@pytest.mark.parametrize("changed", ["pyproject.toml", "server/constraints.txt"])
def test_changed_requirements_install_again(project: Path, changed: str) -> None:
    """A changed requirement makes the installation out of date; the control is the unchanged one."""
    _installed(project, "server")
    assert _bash(project, "promptd_is_set_up server").returncode == 0
    with (project / changed).open("a") as file:
        file.write("\n# changed\n")
    assert _bash(project, "promptd_is_set_up server").returncode == 1


def test_a_moved_project_installs_again(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An editable install points to where the project was."""
    _installed(project, "server")
    moved = tmp_path_factory.mktemp("elsewhere") / "project"
    shutil.copytree(project, moved, symlinks=True)
    assert _bash(moved, "promptd_is_set_up server").returncode == 1


def test_a_broken_environment_is_not_set_up(project: Path) -> None:
    """A .venv whose Python is gone is made anew."""
    _installed(project, "server")
    (project / ".venv" / "bin" / "python").unlink()
    assert _bash(project, "promptd_is_set_up server").returncode != 0


def test_an_old_python_is_not_taken(project: Path) -> None:
    """With no Python 3.11 anywhere, one line says what to install."""
    tools = project / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "flock", "rm"):
        found = shutil.which(name)
        if found:
            (tools / name).symlink_to(found)
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tools / "python3").chmod(0o755)
    done = _bash(project, "promptd_setup server", PATH=str(tools))
    assert done.returncode == 1
    assert "no Python 3.11" in done.stderr and "sudo apt-get" in done.stderr
    assert not (project / ".venv").exists()


@pytest.mark.parametrize(
    ("gpus", "is_reachable", "cpu_index_works", "indexes"),
    [
        ("GPU 0: NVIDIA H200 (UUID: x)", True, True, ["default"]),
        ("", True, True, ["cpu"]),
        ("", True, False, ["cpu", "default"]),
        ("", False, True, ["default"]),
    ],
    ids=["gpu", "no gpu", "cpu index fails", "cpu index out of reach"],
)
def test_which_torch_is_installed(
    project: Path, gpus: str, is_reachable: bool, cpu_index_works: bool, indexes: list[str]
) -> None:
    """The CPU build where no GPU is found, the default index with a GPU and wherever PyTorch's own does not help."""
    (project / "bin").mkdir()
    tool = project / "bin" / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\n[ -n "{gpus}" ] && echo "{gpus}"\n')
    tool.chmod(0o755)
    code = (
        f"promptd_reaches() {{ {str(is_reachable).lower()}; }}\n"
        "promptd_pip() {\n"
        f'  case "$*" in *whl/cpu*) echo cpu; {str(cpu_index_works).lower()};; *) echo default;; esac\n'
        "}\n"
        "promptd_install_torch"
    )
    done = _bash(project, code, PATH=f"{tool.parent}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout.split()) == (0, indexes), done.stderr


@pytest.mark.parametrize(
    ("present", "uid", "apt", "said", "installed"),
    [
        (("redis-server", "haproxy", "nginx", "promtool", "cc"), "1000", True, "", ""),
        (
            ("haproxy", "nginx", "promtool", "cc"),
            "1000",
            True,
            "sudo apt-get update && sudo apt-get install -y --no-install-recommends redis",
            "",
        ),
        (("haproxy", "nginx", "promtool", "cc"), "0", True, "Installing redis-server for the tests", "redis-server"),
        (
            (),
            "0",
            True,
            "Installing redis-server haproxy nginx prometheus gcc libc6-dev for",
            "redis-server haproxy nginx prometheus gcc libc6-dev",
        ),
        ((), "0", False, "needs root", ""),
    ],
    ids=["all there", "no root", "root", "root, all", "no apt"],
)
def test_services_are_installed_or_asked_for(
    project: Path, present: tuple[str, ...], uid: str, apt: bool, said: str, installed: str
) -> None:
    """What the tests run against is installed by root, once; everybody else is told the one line, and goes on."""
    tools = project / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat"):
        (tools / name).symlink_to(shutil.which(name) or name)
    scripts = dict.fromkeys(present, "exit 0") | {"id": f"echo {uid}"}
    if apt:
        scripts["apt-get"] = f'echo "$@" >>{project}/asked'
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    code = f'PATH={tools}; command() {{ PATH={tools} builtin command "$@"; }}; promptd_install_services; echo went on'
    done = _bash(project, code)
    assert done.stdout == "went on\n", done.stderr
    assert said in done.stderr and bool(said) == bool(done.stderr)
    asked = (project / "asked").read_text() if (project / "asked").exists() else ""
    assert asked == (f"update -qq\ninstall -y -qq --no-install-recommends {installed}\n" if installed else "")


@pytest.fixture(scope="module")
def fetch_pip() -> ModuleType:
    """The script server/fetch_pip.py as a module."""
    spec = importlib.util.spec_from_file_location("fetch_pip", ROOT / "server" / "fetch_pip.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_newest_fitting_pip_is_picked(fetch_pip: ModuleType) -> None:
    """Only final wheels with a digest count, and only those for this Python."""
    digest = "a" * 64
    page = fetch_pip.WheelLinks()
    page.feed(
        f'<a href="/f/pip-9.0-py3-none-any.whl#sha256={digest}">x</a>'
        f'<a href="/f/pip-25.1-py3-none-any.whl#sha256={digest}" data-requires-python="&gt;=3.8">x</a>'
        f'<a href="/f/pip-99.0-py3-none-any.whl#sha256={digest}" data-requires-python="&gt;=3.99">x</a>'
        f'<a href="/f/pip-26.0b1-py3-none-any.whl#sha256={digest}">x</a>'
        '<a href="/f/pip-30.0-py3-none-any.whl">x</a>'
        f'<a href="/f/pip-40.0.tar.gz#sha256={digest}">x</a>'
    )
    assert max(page.links) == (25, 1) and sorted(page.links) == [(9, 0), (25, 1)]


def test_a_browser_is_looked_for_once(project: Path) -> None:
    """Where there is one nothing happens; where there is none and none may be installed, that is said once."""
    (project / ".venv").mkdir()
    found = _bash(project, 'command() { [ "$2" = chromium ]; }; promptd_setup_browser')
    assert (found.returncode, found.stderr) == (0, "")
    nowhere = "id() { echo 1000; }; command() { return 1; }; promptd_setup_browser"
    first, second = _bash(project, nowhere), _bash(project, nowhere)
    assert first.returncode == second.returncode == 0
    assert "the console's tests skip" in first.stderr
    assert second.stderr == ""
    assert _bash(project, nowhere, PROMPTD_BROWSER="/opt/browser").stderr == ""
