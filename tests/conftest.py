"""Fixtures that many files share: a server of each engine, and a proxy before it that breaks the link."""

from collections.abc import Iterator

import pytest
import servers


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
