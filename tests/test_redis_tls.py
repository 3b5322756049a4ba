"""TLS to Redis, as the URL asks for it: whom the program trusts, what it shows of itself, and what is refused."""

import asyncio
import socket
import time
from pathlib import Path

import pytest
import redis_tls
import servers
import support
import trustme
from stores import complaint, complaints, failed, ids, long_window, play

import settings
from redis_store import topology, wire


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> redis_tls.Files:
    return redis_tls.Files(tmp_path, authority)


def see_counted(server: redis_tls.Server, query: str) -> None:
    """See the program store an id over TLS."""
    url = f"rediss://127.0.0.1:{server.port}/0{query}"
    with (
        support.verve("--redis-url", url, "--window", str(long_window())) as program,
        support.Client(program.address) as client,
    ):
        assert not failed(client.ask(support.accept(7)))
        assert ids(server.plain) == {7}
        assert complaints(program) == []


def test_an_authority_of_ones_own(engine: str, files: redis_tls.Files) -> None:
    with redis_tls.server(engine, files) as server:
        see_counted(server, f"?ssl_ca_certs={files.authority}")


def test_an_authority_that_the_system_trusts(engine: str, trusted: trustme.CA, files: redis_tls.Files) -> None:
    with redis_tls.server(engine, files) as server:
        see_counted(server, "")


def test_an_authority_of_ones_own_stands_in_for_the_systems(
    engine: str, trusted: trustme.CA, files: redis_tls.Files, tmp_path: Path
) -> None:
    """Else whoever has a certificate of any public authority could pass for Redis."""
    own = tmp_path / "own.pem"
    trustme.CA().cert_pem.write_to_path(str(own))
    with redis_tls.server(engine, files) as server:
        url = f"rediss://127.0.0.1:{server.port}?ssl_ca_certs={own}"
        with support.verve("--redis-url", url) as program, support.Client(program.address) as client:
            assert failed(client.ask(support.accept(7)))
            assert "signed by an authority that is not trusted" in complaint(program)


def test_a_certificate_of_ones_own(engine: str, files: redis_tls.Files) -> None:
    certificate, key = files.client
    with redis_tls.server(engine, files, ask_clients=True) as server:
        see_counted(server, f"?ssl_ca_certs={files.authority}&ssl_certfile={certificate}&ssl_keyfile={key}")


def test_a_certificate_and_its_key_in_one_file(engine: str, files: redis_tls.Files) -> None:
    certificate, key = files.client
    both = certificate.with_name("both.pem")
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    with redis_tls.server(engine, files, ask_clients=True) as server:
        see_counted(server, f"?ssl_ca_certs={files.authority}&ssl_certfile={both}")


def test_a_certificate_for_another_name_where_names_are_not_checked(
    engine: str, authority: trustme.CA, tmp_path: Path
) -> None:
    files = redis_tls.Files(tmp_path, authority, "redis.example")
    with redis_tls.server(engine, files) as server:
        see_counted(server, f"?ssl_ca_certs={files.authority}&ssl_check_hostname=false")


@pytest.mark.parametrize(("word", "checked"), [("true", True), ("True", True), ("false", False), ("FALSE", False)])
def test_names_are_checked_unless_the_url_says_no(word: str, checked: bool) -> None:
    assert topology.address(settings.redis(f"rediss://h?ssl_check_hostname={word}")).check_hostname == checked
    assert topology.address(settings.redis("rediss://h")).check_hostname


def test_an_attempt_that_fails_as_it_is_cancelled_is_not_logged(authority: trustme.CA, tmp_path: Path) -> None:
    """As at a stop: both come in the same turn of the loop, if that was busy."""
    files = redis_tls.Files(tmp_path, authority, "redis.example")

    async def test(port: int) -> None:
        loop = asyncio.get_running_loop()
        address = wire.Address(host="127.0.0.1", port=port, tls=True, ca_certs=str(files.authority))
        for turn in range(60):
            attempt = asyncio.create_task(wire.connect(address, 1))
            reader, writer = socket.socketpair()
            with reader, writer:
                loop.add_reader(reader, attempt.cancel)
                for _ in range(1 + turn % 6):
                    await asyncio.sleep(0.0005)
                writer.send(b"x")
                time.sleep(0.01)  # noqa: ASYNC251
                await asyncio.wait([attempt])
                loop.remove_reader(reader)
            assert attempt.cancelled() or attempt.exception()

    with redis_tls.front(servers.free_port(), files, ask_clients=False) as port:
        play(test(port))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("ssl_check_hostname=", "true or false for ssl_check_hostname"),
        ("ssl_check_hostname=none", "true or false for ssl_check_hostname"),
        ("ssl_keyfile=/key.pem", "ssl_certfile beside ssl_keyfile"),
    ],
)
def test_options_that_cannot_be_meant(query: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        settings.redis(f"rediss://h?{query}")
