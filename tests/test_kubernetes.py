"""What deploy/kubernetes.yaml says: held against the published schemas, and against the program that it starts.

Its lines that begin with `#` and no space are examples; they are read as well as they stand as without the `#`.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import servers
import support
import yaml
from operators import Operators
from processes import wait_until
from support import ROOT

import settings

TEXT = (ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8")
TEXTS = {"as it is": TEXT, "with the examples": re.sub(r"^( *)#(?=\S)", r"\1", TEXT, flags=re.MULTILINE)}
OWN = ("Secret", "Deployment", "PodDisruptionBudget", "Service")  # kinds that each cluster knows

Part = dict[str, Any]


def parts(kind: str, text: str = TEXT) -> list[Part]:
    return [part for part in yaml.safe_load_all(text) if part["kind"] == kind]


def part(kind: str, text: str = TEXT) -> Part:
    (found,) = parts(kind, text)
    return found


def pod(text: str = TEXT) -> Part:
    found: Part = part("Deployment", text)["spec"]["template"]["spec"]
    return found


def container(text: str = TEXT) -> Part:
    (found,) = pod(text)["containers"]
    assert isinstance(found, dict)
    return found


def matches(selector: dict[str, str], of: Part) -> bool:
    return bool(selector) and selector.items() <= of["metadata"]["labels"].items()


def environment(text: str) -> dict[str, str]:
    """Return the variables of the container: those of the image, and those that it is given."""
    image = re.findall(r"^ENV (\w+)=(.*)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    return dict(image) | {variable["name"]: variable["value"] for variable in container(text)["env"]}


def with_secrets(text: str, folder: Path) -> dict[str, str]:
    """Return the variables; the secrets are in the folder, as far as a volume brings them to the container."""
    (volume,) = pod(text)["volumes"]
    secret = part("Secret", text)
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    (mount,) = container(text)["volumeMounts"]
    assert mount["name"] == volume["name"]
    for name, value in secret["stringData"].items():
        (folder / name).write_text(value)
    return {name: value.replace(f"{mount['mountPath']}/", f"{folder}/") for name, value in environment(text).items()}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_it_fits_the_schemas(text: str) -> None:
    """In the newest version and in the oldest that is still in use anywhere, with no field that is unknown."""
    assert {each["kind"] for each in yaml.safe_load_all(text)} == {*OWN, "ServiceMonitor"}
    for each in (each for kind in OWN for each in parts(kind, text)):
        for version in ("1.27", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(each, version, strict=True)


def test_what_belongs_together_finds_each_other() -> None:
    deployment = part("Deployment")
    pods = deployment["spec"]["template"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        part("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        pods["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
        *(service["spec"]["selector"] for service in parts("Service")),
    ):
        assert matches(selector, pods)
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    for service in parts("Service"):
        (port,) = service["spec"]["ports"]
        assert port["port"] == ports[port["targetPort"]]
    monitor = part("ServiceMonitor")["spec"]
    (service,) = [service for service in parts("Service") if matches(monitor["selector"]["matchLabels"], service)]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    alerts = (ROOT / "deploy" / "alerts.yaml").read_text(encoding="utf-8")
    assert f'job="{service["metadata"]["labels"][monitor["jobLabel"]]}"' in alerts


def test_operators_are_not_reached_by_the_public_service() -> None:
    public, private = sorted(parts("Service"), key=lambda service: len(service["metadata"]["name"]))
    assert [port["targetPort"] for port in public["spec"]["ports"]] == ["http"]
    assert private["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_its_settings_are_taken(text: str, tmp_path: Path) -> None:
    variables = with_secrets(text, tmp_path)
    assert settings.unknown_variables(variables) == ""
    config = settings.load([], variables)
    assert config.redis_url == part("Secret", text)["stringData"]["redis-url"]
    assert (config.report_secret is None) == (text == TEXT)
    ports = {port["name"]: port["containerPort"] for port in container(text)["ports"]}
    assert config.admin == ("0.0.0.0", ports["operators"])
    assert config.host == "0.0.0.0"
    assert config.port == ports["http"]
    assert pod(text)["terminationGracePeriodSeconds"] > config.drain_delay + config.drain_timeout
    least = 2 * 120 * config.max_ids / 2**30
    assert float(container(text)["resources"]["limits"]["memory"].removesuffix("Gi")) > least
    assert container(text)["image"].endswith(f":{settings.VERSION}")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_secrets_are_in_files_only(text: str) -> None:
    names = [name.removeprefix("VERVE_").removesuffix("_FILE").lower() for name in environment(text)]
    for name in ("redis_url", "report_url", "report_secret", "sentinel_password"):
        assert f"VERVE_{name.upper()}" not in environment(text)
        assert (name in names) == (name.replace("_", "-") in part("Secret", text)["stringData"])


def test_it_may_do_nothing_but_serve() -> None:
    assert pod()["enableServiceLinks"] is False
    assert pod()["automountServiceAccountToken"] is False
    user = f"{pod()['securityContext']['runAsUser']}:{pod()['securityContext']['runAsGroup']}"
    assert f"\nUSER {user}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert pod()["securityContext"]["runAsNonRoot"] is True
    (volume,) = pod()["volumes"]
    assert volume["secret"]["defaultMode"] == 0o440
    assert pod()["securityContext"]["fsGroup"] == pod()["securityContext"]["runAsGroup"]
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_probes_find_what_they_ask_for(tmp_path: Path) -> None:
    """An instance is alive without Redis, and ready with it."""
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        variables = with_secrets(TEXT, tmp_path)
        (tmp_path / "redis-url").write_text(f"{server.url}\n")
        variables |= {"VERVE_HOST": "127.0.0.1", "VERVE_PORT": "0", "VERVE_ADMIN": "127.0.0.1:0"}
        variables |= {"VERVE_DRAIN_DELAY": "0", "VERVE_LOG_FORMAT": "text", "VERVE_WINDOW": "86400"}
        process = subprocess.Popen(
            [sys.executable, str(support.SERVER)], env=support.environment() | variables, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        log = support.Lines(process.stderr)
        try:
            operators = Operators(("127.0.0.1", int(log.wait_for(r"operators: http://127\.0\.0\.1:([0-9]+)")[1])))
            log.wait_for("listening on")
            alive, ready = (container()[f"{probe}Probe"]["httpGet"] for probe in ("liveness", "readiness"))
            assert alive["port"] == ready["port"] == "operators"
            wait_until(lambda: operators.ask(ready["path"]).status == 200)
            server.kill()
            wait_until(lambda: operators.ask(ready["path"]).status == 503)
            assert operators.ask(alive["path"]).status == 200
            assert operators.ask(part("ServiceMonitor")["spec"]["endpoints"][0]["path"]).status == 200
        finally:
            process.terminate()
            status = process.wait(support.DEADLINE)
            log.join()
        assert status == 0
