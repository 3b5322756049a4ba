"""compose.cluster.yaml, as much of it as can be carried out without an engine for containers.

Its six servers run here with their flags, on ports of their own, and its `create` makes a cluster of them.
"""

import contextlib
import subprocess
from typing import Any

import clusters
import pytest
import servers
import support
import yaml
from support import ROOT

NET = "172.30.8."


def compose() -> Any:
    return yaml.safe_load((ROOT / "compose.cluster.yaml").read_text())


def nodes() -> dict[str, Any]:
    return {name: service for name, service in compose()["services"].items() if name.startswith("redis-")}


def test_instances_and_nginx_are_those_of_the_other_file() -> None:
    services = compose()["services"]
    other = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert services["nginx"] == other["nginx"]
    assert services["verve-1"] == services["verve-2"]
    differ = {name for name in services["verve-1"] if services["verve-1"][name] != other["verve-1"][name]}
    assert differ == {"environment", "depends_on"}
    scheme, _, addresses = services["verve-1"]["environment"]["VERVE_REDIS_URL"].partition("://")
    assert scheme == "redis"
    assert {f"{name}:6379" for name in nodes()} > set(addresses.split(",")) > {"redis-1:6379", "redis-2:6379"}


def test_each_node_has_its_address_and_its_data() -> None:
    found = compose()
    addresses = [node["networks"]["default"]["ipv4_address"] for node in nodes().values()]
    assert addresses == [f"{NET}{number}" for number in range(11, 17)]
    assert found["networks"]["default"]["ipam"]["config"] == [{"subnet": f"{NET}0/24"}]
    assert [node["volumes"] for node in nodes().values()] == [[f"{name}:/data"] for name in nodes()]
    assert set(found["volumes"]) == set(nodes())
    kept = ("volumes", "networks")
    alike = [{key: value for key, value in node.items() if key not in kept} for node in nodes().values()]
    assert alike == [found["x-node"]] * 6
    assert set(found["services"]["create"]["depends_on"]) == set(nodes())
    assert {name for service in found["services"].values() for name in service.get("depends_on", ())} <= set(
        found["services"]
    )


def is_well(node: servers.Redis) -> bool:
    """Whether a node finds the cluster well, and three primaries with a replica each."""
    with node.client() as client:
        said: Any = client.execute_command("CLUSTER", "INFO")
        slots: Any = client.execute_command("CLUSTER", "SLOTS")
    return "cluster_state:ok" in said and [len(nodes) for _, _, *nodes in slots] == [2, 2, 2]


@pytest.mark.parametrize("engine", servers.ENGINES)
def test_a_cluster_is_made_of_the_nodes_once(engine: str) -> None:
    support.need("redis-cli", "redis-tools")
    with contextlib.ExitStack() as stack:
        there = {}
        for node in nodes().values():
            program, *flags = node["command"]
            assert program == "redis-server"
            bus = servers.free_port()
            server = stack.enter_context(servers.Redis(engine, *flags, "--cluster-port", str(bus)))
            there[node["networks"]["default"]["ipv4_address"]] = server, bus
        *shell, script = compose()["services"]["create"]["command"]
        for address, (server, bus) in there.items():
            script = script.replace(f"{address} -p 6379", f"127.0.0.1 -p {server.port}")
            script = script.replace(f"{address}:6379", f"127.0.0.1:{server.port}@{bus}")
        assert "6379" not in script
        running = [server for server, _ in there.values()]
        for _ in range(2):  # the second time there is nothing to do
            subprocess.run([*shell, script], check=True, capture_output=True, timeout=support.DEADLINE)
            clusters.wait_until(lambda: all(map(is_well, running)), "well")
        with running[0].client() as client:
            got: Any = client.config_get("*")
        assert got["maxmemory-policy"] == "noeviction"
        assert got["cluster-require-full-coverage"] == "no"
        assert got["appendonly"] == "yes"
        assert int(got["maxmemory"]) == 2**30
