"""What is shipped for containers: read by the real tools where they are there, and held against the code it names."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from promptd_store import VolatileStoreError, open_store
from pydantic import ValidationError

from promptd.api.routes import ROUTES
from promptd.modeling.kernels import FOLDER_VARIABLE
from promptd.settings import Settings
from tests.api.conftest import LiveServer, server  # noqa: F401 - a fixture
from tests.docker.dockerfile import context, pairs, stages
from tests.haproxy import configured
from tests.redis_server import program, running_redis

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
IMAGES = ("Dockerfile", "Dockerfile.cuda")
PATHS = {route.path for route in ROUTES}


def settings_named(environment: dict[str, Any]) -> None:
    """Every PROMPTD_ variable is one that the settings read, or the place of compiled kernels."""
    for name in environment:
        if name.startswith("PROMPTD_") and name != FOLDER_VARIABLE:
            assert name.removeprefix("PROMPTD_").lower() in Settings.model_fields, name


def test_the_image_brings_its_kernels() -> None:
    """They are compiled where the server will look for them: it has no compiler, and writes nothing."""
    build, image = stages(DOCKER / "Dockerfile")
    folder = pairs(image.last("ENV").rest)[FOLDER_VARIABLE]
    made = f"-m promptd.modeling.kernels {folder} && chmod 755 {folder}"  # another user reads them than makes them
    assert any(one.rest.endswith(made) for one in build.instructions)
    copied = [one for one in image.instructions if one.word == "COPY"]
    assert [(one.flags, one.rest) for one in copied] == [({"from": "build"}, "/opt/promptd /opt/promptd")]
    assert folder.startswith("/opt/promptd/")


@pytest.mark.parametrize("name", IMAGES)
def test_image(name: str) -> None:
    """Two stages of a pinned base; not root, with a health check; installs are pinned; what is copied is there."""
    _, image = found = stages(DOCKER / name)
    assert {stage.base for stage in found} == {"python:3.12.8-slim-bookworm"}
    steps = [one for stage in found for one in stage.instructions]
    assert not {"ADD", "MAINTAINER"} & {one.word for one in steps}
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", image.last("USER").rest), (
        "a number, so that Kubernetes can tell that it is not root"
    )
    order = [one.word for one in image.instructions]
    assert order.index("USER") < order.index("ENTRYPOINT") and not {"RUN", "COPY"} & set(order[order.index("USER") :])
    assert image.last("ENTRYPOINT").words + image.last("CMD").words == ["promptd", "serve"], "a shell keeps signals"
    check = image.last("HEALTHCHECK").words
    assert "/livez" in PATHS and "/livez" in check[-1] and check[0] == "python"
    settings_named(pairs(image.last("ENV").rest))
    is_sent = context(ROOT)
    for one in steps:
        if one.word == "COPY" and "from" not in one.flags:
            for source in one.rest.split()[:-1]:
                assert (ROOT / source).exists() and is_sent(ROOT / source), source
        for command in one.rest.split("&&") if one.word == "RUN" else ():
            assert "sudo" not in command and "upgrade" not in command
            assert "pip install" not in command or "--constraint" in command
            assert "apt-get install" not in command or "--no-install-recommends" in command
        assert "apt-get" not in one.rest or "rm -rf /var/lib/apt/lists" in one.rest


def test_what_the_builder_is_sent() -> None:
    """The packages and what they are made by: no history, no environment, nobody's store, nothing compiled."""
    is_sent = context(ROOT)
    for name in ("server/promptd/cli.py", "server/promptd/demo/model/config.json", "docker/constraints.txt", "LICENSE"):
        assert is_sent(ROOT / name) and (ROOT / name).exists(), name
    for name in (".git", ".venv", "tests", "build", "promptd-data", "server/promptd/__pycache__/cli.pyc", "docker"):
        assert not is_sent(ROOT / name), name


def test_constraints_pin_everything_the_server_needs() -> None:
    """Every requirement of the server has one exact version, which the project's own range allows."""
    pins = dict(line.split("==") for line in (DOCKER / "constraints.txt").read_text().splitlines() if line[:1] != "#")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["server"] + extras["s3"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), text


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """compose.yaml, its shared parts in place."""
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


def test_compose(compose: dict[str, Any]) -> None:
    """Images are pinned, nothing has rights or a writable root that it does not need, what is named is there."""
    services = compose["services"]
    assert {"redis", "promptd", "worker", "promptd-gpu", "haproxy", "prometheus", "grafana"} == set(services)
    for name, service in services.items():
        assert re.search(r":[\w.-]*\d|:cuda$", service["image"]), f"{name}: {service['image']}"
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("read_only") or name == "grafana", name
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume).split(":")[0]
            assert (DOCKER / source).exists() if source[0] == "." else source in compose["volumes"], volume
        settings_named({key: 0 for key in service.get("environment", {}) if key != "PROMPTD_HOST" or name != "haproxy"})
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        for other in service.get("depends_on", ()):
            assert other in services
    assert services["promptd"]["deploy"]["replicas"] == 2
    assert services["promptd-gpu"]["profiles"] == ["gpu"] and "profiles" not in services["promptd"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports == ["8000:8080", "127.0.0.1:3000:3000"], "only the balancer is open to others"
    grace = float(services["promptd"]["stop_grace_period"].rstrip("s"))
    fields = Settings.model_fields
    assert grace > fields["leave_seconds"].default + fields["drain_seconds"].default + 5


def test_compose_as_its_specification_has_it(tmp_path: Path) -> None:
    """Valid by the schema of the Compose project, which check-jsonschema carries. The control misspells a key."""
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed: pip install 'promptd[dev]'")
    text = (DOCKER / "compose.yaml").read_text()
    (tmp_path / "misspelt.yaml").write_text(text.replace("read_only:", "readonly:"))
    for path, is_good in ((DOCKER / "compose.yaml", True), (tmp_path / "misspelt.yaml", False)):
        words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode == 0) == is_good and ("readonly" in done.stdout) != is_good, done.stdout + done.stderr


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    """What Kubernetes sets: values, and those of the container's own resources."""
    found = {}
    for one in container["env"]:
        if "value" in one:
            found[one["name"]] = one["value"]
        else:
            kind, _, what = one["valueFrom"]["resourceFieldRef"]["resource"].partition(".")
            found[one["name"]] = container["resources"][kind][what]
    return found


def test_a_worker_answers_where_it_is_asked(compose: dict[str, Any]) -> None:
    """Its port is the same for Prometheus, its health check and itself, in the compose file and in Kubernetes."""
    worker = compose["services"]["worker"]
    port = worker["environment"]["PROMPTD_METRICS_PORT"]
    assert worker["environment"].items() >= compose["x-promptd"]["environment"].items()
    assert f"http://127.0.0.1:{port}/livez" in worker["healthcheck"]["test"][-1]
    jobs = {one["job_name"]: one for one in yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]}
    assert jobs["worker"]["dns_sd_configs"] == [{"names": ["worker"], "type": "A", "port": port}]
    pod = next(one for one in manifests() if one["metadata"]["name"] == "promptd-worker")["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    environment = environment_of(container)
    assert environment["PROMPTD_METRICS_PORT"] == pod["metadata"]["annotations"]["prometheus.io/port"]
    assert int(environment["PROMPTD_METRICS_PORT"]) == container["ports"][0]["containerPort"] == port


def test_composed_redis_is_one_that_promptd_takes(tmp_path: Path) -> None:
    """The shipped redis.conf starts a Redis without a fault; the control lacks its append-only file."""
    lines = [
        line.split(None, 1) for line in (DOCKER / "redis.conf").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    shipped = {name: value for name, value in lines if name != "dir"}

    async def opens(url: str) -> None:
        await (await open_store(url)).close()

    with running_redis(tmp_path / "as-shipped", **shipped) as redis:
        asyncio.run(opens(redis.url))
    with (
        running_redis(tmp_path / "without", **{**shipped, "appendonly": "no"}) as redis,
        pytest.raises(VolatileStoreError),
    ):
        asyncio.run(opens(redis.url))


def checked_by_haproxy(path: Path) -> subprocess.CompletedProcess[str]:
    """What `haproxy -c` says."""
    return subprocess.run(
        [program("haproxy"), "-c", "-f", path],
        env={**os.environ, "PROMPTD_HOST": "localhost"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_haproxy_takes_its_configuration(tmp_path: Path) -> None:
    """As shipped, and as the tests run it, without a warning; the control has a word that HAProxy does not know."""
    (tmp_path / "as-run.cfg").write_text(configured([1, 2], 3, 4, retries=False))
    for path in (DOCKER / "haproxy.cfg", tmp_path / "as-run.cfg"):
        done = checked_by_haproxy(path)
        assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    (tmp_path / "broken.cfg").write_text((DOCKER / "haproxy.cfg").read_text().replace("abortonclose", "abortonclosed"))
    assert checked_by_haproxy(tmp_path / "broken.cfg").returncode != 0


def manifests() -> Iterator[dict[str, Any]]:
    """The Kubernetes objects."""
    yield from yaml.safe_load_all((DOCKER / "kubernetes" / "promptd.yaml").read_text())


def test_kubernetes() -> None:
    """Probes ask routes that exist, selectors select, pods are not root and write nowhere, settings are known."""
    found = {(one["kind"], one["metadata"]["name"]): one for one in manifests()}
    pods = {name: one["spec"]["template"] for (kind, name), one in found.items() if kind == "Deployment"}
    assert set(pods) == {"promptd", "promptd-worker"}
    claims = {name for kind, name in found if kind == "PersistentVolumeClaim"}
    for name, pod in pods.items():
        assert found["Deployment", name]["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]} and ":" in container["image"]
        settings_named(environment_of(container))
        assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["spec"]["volumes"]}
        for volume in pod["spec"]["volumes"]:
            assert "emptyDir" in volume or volume["persistentVolumeClaim"]["claimName"] in claims
        probes = {what: one["httpGet"] for what, one in container.items() if what.endswith("Probe")}
        assert set(probes) >= {"startupProbe", "livenessProbe"} and ("readinessProbe" in probes) == (name == "promptd")
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        assert all(one["path"] in PATHS and one["port"] in ports for one in probes.values())
        assert pod["metadata"]["annotations"]["prometheus.io/port"] in map(str, ports.values())
        secret = container["envFrom"][0]["secretRef"]["name"]
        settings_named(found["Secret", secret]["stringData"])
    server_labels = pods["promptd"]["metadata"]["labels"]
    assert found["Service", "promptd"]["spec"]["selector"] == server_labels
    assert found["PodDisruptionBudget", "promptd"]["spec"]["selector"]["matchLabels"] == server_labels
    scaler = found["HorizontalPodAutoscaler", "promptd"]["spec"]
    assert ("Deployment", scaler["scaleTargetRef"]["name"]) in found
    environment = environment_of(pods["promptd"]["spec"]["containers"][0])
    command = pods["promptd"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:3] == ["promptd", "drain", "--wait"] and float(command[3]) > float(
        environment["PROMPTD_LEAVE_SECONDS"]
    )
    needs = float(command[3]) + Settings.model_fields["drain_seconds"].default + 5
    assert pods["promptd"]["spec"]["terminationGracePeriodSeconds"] > needs


@pytest.mark.long
def test_kubernetes_as_its_schema_has_it() -> None:
    """Every object is valid by Kubernetes' own schema, as kubernetes-validate has it. The control misspells a key."""
    schema = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed: pip install 'promptd[deploy-tests]'"
    )
    version = schema.latest_version()
    for one in manifests():
        schema.validate(one, version, strict=True)
    deployment = next(one for one in manifests() if one["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(schema.ValidationError, match="enableServiceLink"):
        schema.validate(deployment, version, strict=True)


def service_links(service: dict[str, Any]) -> dict[str, str]:
    """What Kubernetes puts into the environment of each pod for a Service, unless the pod does without."""
    word = service["metadata"]["name"].upper().replace("-", "_")
    found = {f"{word}_SERVICE_HOST": "10.96.0.1"}
    for one in service["spec"]["ports"]:
        address = f"tcp://10.96.0.1:{one['port']}"
        found |= {f"{word}_SERVICE_PORT": str(one["port"]), f"{word}_PORT": address}
    return found


def test_no_service_changes_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """PROMPTD_PORT is also what Kubernetes tells of a Service: pods do without. The control: with it nothing starts."""
    for one in manifests():
        if one["kind"] == "Deployment":
            assert one["spec"]["template"]["spec"]["enableServiceLinks"] is False
    for service in (one for one in manifests() if one["kind"] == "Service"):
        for name, value in service_links(service).items():
            monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match="enableServiceLinks: false"):
        Settings()


def test_the_autoscaler_and_prometheus_ask_for_what_there_is(server: LiveServer) -> None:  # noqa: F811
    """Every metric that the autoscaler names is one that a server exports; scraped are the services of the compose."""
    with server.http() as http:
        exported = set(re.findall(r"^(promptd_\w+?)(?:\{| )", http.get("/metrics").text, flags=re.MULTILINE))
    scaler = next(one for one in manifests() if one["kind"] == "HorizontalPodAutoscaler")
    named = {one["pods"]["metric"]["name"] for one in scaler["spec"]["metrics"]}
    assert named and named <= exported
    sources = yaml.safe_load((DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "promptd.json").read_text())
    asked = {panel["datasource"]["uid"] for panel in dashboard["panels"] if panel["type"] != "row"}
    assert asked == {sources["datasources"][0]["uid"]}
    jobs = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    services = set(yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"])
    assert {job["job_name"] for job in jobs} <= services
