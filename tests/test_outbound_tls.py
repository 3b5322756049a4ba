"""TLS of the outbound client: which certificates are accepted, and what is said of others."""

import asyncio
import os
import ssl
import warnings
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from peers import CUT, OK, SHORT, Names, Net, Peer, answer, last_words, serving

import outbound


def test_tls_with_a_good_certificate(net: Net, names: Names, trusted: trustme.CA) -> None:
    context = serving(trusted, "good.test", "*.many.test")
    context.set_alpn_protocols(["h2", "http/1.1"])
    shown: list[str | None] = []
    context.sni_callback = lambda _, name, __: shown.append(name)
    spoken: list[tuple[str | None, str | None]] = []

    async def play(peer: Peer) -> None:
        tls = peer.writer.get_extra_info("ssl_object")
        spoken.append((tls.selected_alpn_protocol(), tls.version()))
        await answer()(peer)

    receiver = net.receiver(play, tls=context)
    names["good.test"] = names["a.many.test"] = names["good.test."] = [["127.0.0.1"]]
    assert [net.status(receiver.url(host="good.test")) for _ in range(3)] == [200] * 3
    assert receiver.accepted == 1
    assert net.status(receiver.url(host="a.many.test")) == 200
    assert net.status(receiver.url(host="GOOD.test.")) == 200
    assert shown == ["good.test", "a.many.test", "good.test"]
    assert spoken == [("http/1.1", "TLSv1.3")] * 3


def test_tls_to_an_address(net: Net, trusted: trustme.CA) -> None:
    context = serving(trusted, "127.0.0.1")
    shown: list[str | None] = []
    context.sni_callback = lambda _, name, __: shown.append(name)
    receiver = net.receiver(answer(), tls=context)
    assert net.status(receiver.url()) == 200
    assert shown == [None]
    other = net.receiver(answer(), "127.0.0.2", tls=context)
    assert "TLS failed: CERTIFICATE_VERIFY_FAILED" in net.error(other.url())
    assert other.requests == []


def utc_days(number: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=number)


@pytest.mark.parametrize(
    ("identity", "options"),
    [
        pytest.param("other.test", {}, id="other-name"),
        pytest.param("*.good.test", {}, id="wildcard-below"),
        pytest.param("sub.good.test", {}, id="sub-domain"),
        pytest.param("127.0.0.1", {}, id="its-address"),
        pytest.param("good.test", {"not_before": utc_days(-9), "not_after": utc_days(-1)}, id="expired"),
        pytest.param("good.test", {"not_before": utc_days(1), "not_after": utc_days(9)}, id="not-yet"),
    ],
)
def test_tls_with_a_bad_certificate(
    net: Net, names: Names, trusted: trustme.CA, identity: str, options: dict[str, datetime]
) -> None:
    names["good.test"] = [["127.0.0.1"]]
    receiver = net.receiver(answer(), tls=serving(trusted, identity, **options))
    assert net.error(receiver.url(host="good.test")) == "TLS failed: CERTIFICATE_VERIFY_FAILED"
    assert receiver.requests == []
    assert net.plain.connections == 0


def test_tls_with_a_certificate_that_nobody_trusts(net: Net, names: Names, trusted: trustme.CA) -> None:
    names["good.test"] = [["127.0.0.1"]]
    stranger = trustme.CA()
    receiver = net.receiver(answer(), tls=serving(stranger, "good.test"))
    assert net.error(receiver.url(host="good.test")) == "TLS failed: CERTIFICATE_VERIFY_FAILED"
    assert receiver.requests == []


def test_tls_with_a_server_that_does_not_speak_it(net: Net) -> None:
    async def play(peer: Peer) -> None:
        await peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await peer.closed()

    receiver = net.receiver(play)
    assert net.error(receiver.url(secure=True)).startswith("TLS failed: ")
    assert receiver.requests == []


@pytest.mark.parametrize("force", [False, True])
def test_tls_that_ends_amid_the_handshake(net: Net, force: bool) -> None:
    async def play(peer: Peer) -> None:
        await peer.reader.read(1)
        if force:
            await peer.reset()

    assert net.error(net.receiver(play).url(secure=True))
    assert net.plain.connections == 0


def test_a_handshake_that_takes_too_long_is_an_error(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)

    async def play(peer: Peer) -> None:
        await peer.closed()

    receiver = net.receiver(play)
    results = net.ask(*[receiver.url(secure=True)] * 5)
    assert {str(result) for result in results} == {"no connection in time"}
    net.until(lambda: net.plain.connections == receiver.open == 0)


def test_old_tls_is_refused(net: Net, trusted: trustme.CA) -> None:
    context = serving(trusted, "127.0.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    receiver = net.receiver(answer(), tls=context)
    assert net.error(receiver.url())
    assert receiver.accepted == 0

    async def connect() -> None:
        old = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.set_ciphers("ALL:@SECLEVEL=0")
        _, writer = await asyncio.open_connection("127.0.0.1", receiver.port, ssl=old)
        writer.close()
        await writer.wait_closed()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net.run(connect())  # it serves those who put up with it

    newer = serving(trusted, "127.0.0.1")
    newer.maximum_version = ssl.TLSVersion.TLSv1_2
    assert net.status(net.receiver(answer(), tls=newer).url()) == 200


def test_plain_text_to_a_server_of_tls(net: Net, trusted: trustme.CA) -> None:
    receiver = net.receiver(answer(), tls=serving(trusted, "127.0.0.1"))
    assert net.error(receiver.url(secure=False))
    assert receiver.requests == []


def test_tls_answers_in_every_framing(net: Net, trusted: trustme.CA) -> None:
    context = serving(trusted, "127.0.0.1")
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    good = net.receiver(answer(*(chunks[at : at + 1] for at in range(len(chunks)))), tls=context)
    assert [net.status(good.url()) for _ in range(2)] == [200, 200]
    assert good.accepted == 1
    assert net.status(net.receiver(last_words(b"HTTP/1.1 200 OK\r\n\r\nthe rest"), tls=context).url()) == 200
    assert CUT in net.error(net.receiver(last_words(b"HTTP/1.1 200 OK\r\n"), tls=context).url())


def test_tls_connection_closed_under_a_request_is_replaced(net: Net, trusted: trustme.CA) -> None:
    async def play(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        if peer.number > 1:
            await peer.send(OK)
            await peer.closed()

    receiver = net.receiver(play, tls=serving(trusted, "127.0.0.1"))
    assert [net.status(receiver.url()) for _ in range(3)] == [200] * 3
    assert (receiver.accepted, len(receiver.requests)) == (2, 4)
