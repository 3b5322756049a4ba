"""What many files share: servers of Redis, receivers, the outbound client's world; and marks for each test."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import http_peers
import marks
import peers
import pytest
import receivers
import servers
import spies
import trustme

import outbound

WORLDS: dict[str, Callable[[http_peers.Store], http_peers.Memory | http_peers.Socket]] = {
    "memory": http_peers.Memory,
    "socket": http_peers.Socket,
}


@pytest.fixture(params=servers.ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(engine: str) -> Iterator[servers.Redis]:
    with servers.Redis(engine) as server:
        yield server


@pytest.fixture
def proxy(server: servers.Redis) -> Iterator[servers.Proxy]:
    with servers.Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def receiver() -> Iterator[receivers.Receiver]:
    with receivers.Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def spy() -> Iterator[spies.Spy]:
    with spies.watching() as spy:
        yield spy


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[peers.Net]:
    monkeypatch.setattr(outbound, "SWEEP_TIME", 0.02)
    for name in ("EXCHANGE_TIME", "IDLE_TIME", "QUEUE_TIME"):  # what is seen is not to come of itself after a while
        monkeypatch.setattr(outbound, name, 2 * peers.GUARD_TIME)
    world = peers.Net()
    try:
        yield world
        world.close()
    finally:
        for client in world.clients:
            client.close()
        world.spin()
        world.loop.close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[peers.Names]:
    stand_in = peers.Names()
    monkeypatch.setattr(outbound, "resolve", stand_in)
    yield stand_in
    for gate in stand_in.gates.values():
        gate.set()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """An authority that the system trusts."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return authority


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> Iterator[http_peers.Memory | http_peers.Socket]:
    with WORLDS[request.param](http_peers.Store()) as world:
        yield world


@pytest.fixture
def memory() -> Iterator[http_peers.Memory]:
    with http_peers.Memory() as memory:
        yield memory


@pytest.fixture
def later() -> Iterator[tuple[http_peers.Memory, http_peers.Waiting]]:
    store = http_peers.Waiting()
    with http_peers.Memory(store) as memory:
        yield memory, store


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test, and have each worker begin with some of the longest, so that none is left over at the end."""
    for item in items:
        if isinstance(item, pytest.Function):
            for mark in marks.marks_of(item, globals()):
                item.add_marker(mark)
    long = [item for item in items if item.get_closest_marker("soak")]
    short = [item for item in reversed(items) if not item.get_closest_marker("soak")]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ordered: list[pytest.Item] = []
    for number in range(workers):  # as xdist shares them out
        size = (len(items) - len(ordered)) // (workers - number)
        first = long[number::workers]
        ordered += [*first, *(short.pop() for _ in range(min(len(short), size - len(first))))]
    items[:] = [*ordered, *reversed(short)]
