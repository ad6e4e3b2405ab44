"""The image as its Dockerfile makes it, without a container engine: built, looked through, run as compose runs it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from tests.docker.image import Image, build
from tests.docker.tree import PATH, Mount, as_user, can_be_entered
from tests.engine.harness import library
from tests.patience import until
from tests.ports import NO_CERTIFICATES, free_port

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
KEY = "key-of-the-admin"
START_SECONDS = 300
END_SECONDS = 60


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Built once, of this working tree."""
    if why := can_be_entered():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("image")
    made = build(ROOT / "docker" / "Dockerfile", ROOT, folder)
    print(f"the image: {made.tree.num_bytes / 1e6:.0f} MB, {made.num_base_bytes / 1e6:.0f} MB of them its base")
    yield made
    shutil.rmtree(folder)  # some gigabytes


class Container:
    """A process in the tree as compose.yaml runs it: not root, no rights, nothing to write on but /tmp and /data."""

    def __init__(self, image: Image, models: Path, data: Path, log: Path, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._image = image
        self._log = log
        own = {"PROMPTD_PORT": str(self.port), "PROMPTD_ADMIN_KEY": KEY, **settings}
        self.environment = {**image.environment, **own}
        mounts = [Mount("/tmp"), Mount("/models", models), Mount("/data", data, is_writable=True)]  # noqa: S108
        words = image.tree.command(
            image.words, self.environment, user=image.user, folder=image.folder, mounts=mounts, is_read_only=True
        )
        with log.open("ab") as file:
            self._outer = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)

    @property
    def pid(self) -> int | None:
        """Of the first process inside, as it is called outside; None before it is there."""
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def run(self, words: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command beside the server, as `docker exec` does."""
        who = as_user(self._image.user, self.environment if environment is None else environment, self._image.folder)
        inside = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--root", "--wd", *who, *words]
        return subprocess.run(inside, capture_output=True, text=True, timeout=60, check=False)

    @property
    def is_healthy(self) -> bool:
        """What its HEALTHCHECK says."""
        assert self._outer.poll() is None, self._log.read_text()
        check = self._image.stage.last("HEALTHCHECK")
        return self.pid is not None and self.run(check.words).returncode == 0

    def stop(self) -> int:
        """Send it its STOPSIGNAL and return how it ended."""
        assert self.pid is not None
        os.kill(self.pid, signal.Signals[self._image.stage.last("STOPSIGNAL").rest])
        return self._outer.wait(END_SECONDS)

    def close(self) -> None:
        """End it if it runs: its tree's mounts go with it."""
        self._outer.kill()
        self._outer.wait(END_SECONDS)


@contextlib.contextmanager
def running(image: Image, models: Path, folder: Path, **settings: str) -> Iterator[Container]:
    """Run it for a block, over a volume that is the user's own."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    os.chown(data, *map(int, image.user.split(":")))
    container = Container(image, models, data, folder / "log", **settings)
    try:
        yield container
    finally:
        container.close()


def test_it_serves_from_a_root_that_cannot_be_written(
    image: Image, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A model and a store as volumes: healthy, one completion, SIGTERM ends it with 0; a second one has the prompt.

    The controls: a health check of another port fails, and nothing can be written where the image lies.
    """
    model = tmp_path / "models" / "tiny"
    shutil.copytree(tiny_models["llama"], model)
    for path in (model.parent, model, *model.iterdir()):
        path.chmod(path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))  # it is not the reader's
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": "tone", "prompt": "the quick", "max_tokens": 3, "ignore_eos": True, "temperature": 0}
    texts = []
    for number in range(2):
        with running(image, model.parent, tmp_path, PROMPTD_MODEL=f"/models/{model.name}") as container:
            until(lambda: container.is_healthy, "the health check", seconds=START_SECONDS, pause_seconds=0.5)
            with httpx.Client(base_url=container.url, headers=headers, timeout=60, verify=NO_CERTIFICATES) as http:
                if number == 0:
                    artifact = library(model)[0]
                    http.put("/v1/prompts/tone", content=artifact.content).raise_for_status()
                    elsewhere = {**container.environment, "PROMPTD_PORT": str(free_port())}
                    check = image.stage.last("HEALTHCHECK").words
                    assert container.run(check, elsewhere).returncode != 0
                    assert container.run(check).returncode == 0
                    said = container.run(
                        ["sh", "-c", "id -u; touch /opt/promptd/new /etc/new; touch /tmp/new /data/new"]
                    )
                    assert said.stdout == image.user.split(":")[0] + "\n"
                    assert said.stderr.count("Read-only file system") == 2 and said.stderr.count("\n") == 2
                texts.append(http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"])
            assert container.stop() == 0, (tmp_path / "log").read_text()
    assert texts[0] == texts[1]


def test_nothing_of_it_can_be_written(image: Image) -> None:
    """Also where the root is not mounted read-only: what its user may write is not the image's own.

    The control: root may write everywhere.
    """
    places = "/bin /boot /etc /home /lib /opt /root /sbin /srv /usr"
    search = ["sh", "-c", f"find {places} -xdev -writable ! -type l 2>/dev/null; true"]
    assert image.tree.run(search, {"PATH": PATH}, user=image.user) == ""
    assert "/opt/promptd/bin/python" in image.tree.run(["sh", "-c", f"find {places} -xdev -writable"], {"PATH": PATH})


def versions(path: Path) -> dict[str, str]:
    """Packages and their versions, without what tells builds apart."""
    pairs = (line.split("==") for line in path.read_text().splitlines() if not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version.split("+")[0] for name, version in pairs}


def test_what_is_in_it(image: Image, tmp_path: Path) -> None:
    """Packages as they are pinned, and a list of them; the kernels; no compiler and nothing of the builder's."""
    installed = versions(image.tree.inside("/opt/promptd/packages.txt"))
    del installed["async-timeout"]  # which Debian's Python 3.11.2 alone needs
    assert installed.items() <= versions(ROOT / "docker" / "constraints.txt").items()
    assert {"torch", "transformers", "redis", "s3fs"} <= set(installed)
    assert list(image.tree.inside(image.environment["PROMPTD_KERNELS"]).iterdir())
    for gone in ("/usr/bin/cc", "/usr/bin/gcc", "/src", "/root/.cache", "/etc/resolv.conf"):
        assert not image.tree.inside(gone).exists(), gone
    assert not list(image.tree.inside("/opt/promptd").rglob("tests/docker")), "the context holds no tests"
    told = image.tree.run(["promptd", "doctor"], image.environment, user=image.user, mounts=[Mount("/tmp")])  # noqa: S108
    assert {line.split()[0] for line in told.splitlines()} == {"ok"} and "compiled for" in told, told
    model = tmp_path / "unreadable"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "config.json").chmod(0o600)
    model.chmod(0o755)
    mounts = [Mount("/tmp"), Mount("/models", model)]  # noqa: S108
    with pytest.raises(AssertionError, match=r"config\.json: this server.s user may not read it"):
        image.tree.run(["promptd", "doctor", "--model", "/models"], image.environment, user=image.user, mounts=mounts)
