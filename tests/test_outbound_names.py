"""Names of hosts: looked up apart from the loop, and every address judged before it is connected to."""

import asyncio
import gc
import threading
from ipaddress import ip_network

import pytest
from peers import GUARD_TIME, SHORT, Names, Net, answer, last_words

import outbound
from outbound import ForbiddenError, Guard, Response, parse


def test_a_name_that_leads_to_a_forbidden_address_is_refused(net: Net, names: Names) -> None:
    receiver = net.receiver(answer())
    names["inside.test"] = [["127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"]]
    client = net.client(Guard())
    results = net.ask(*[receiver.url(host="inside.test")] * 5, receiver.url(), client=client)
    assert {type(result) for result in results} == {ForbiddenError}
    assert receiver.accepted == 0
    assert client.connections == 0


def test_localhost_is_refused_as_the_system_resolves_it(net: Net) -> None:
    receiver = net.receiver(answer())
    [result] = net.ask(receiver.url(host="localhost"), client=net.client(Guard()))
    assert isinstance(result, ForbiddenError)
    assert receiver.accepted == 0
    assert net.status(receiver.url(host="localhost")) == 200


def test_of_several_addresses_only_allowed_ones_are_connected_to(net: Net, names: Names) -> None:
    good = net.receiver(answer())
    inside = net.receiver(answer(), "127.0.0.2", port=good.port)
    client = net.client(Guard([ip_network("127.0.0.1/32"), ip_network("127.0.0.9/32")]))
    names["mixed.test"] = [["127.0.0.2", "127.0.0.9", "127.0.0.1", "127.0.0.2"]]
    assert net.ask(*[good.url(host="mixed.test")] * 3, client=client) == [Response(200, "")] * 3
    assert inside.accepted == 0


def test_a_name_that_changes_its_mind_is_judged_each_time(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that says a good address at first and a forbidden one then: rebinding."""
    monkeypatch.setattr(outbound, "LOOKUP_TIME", -1.0)
    good = net.receiver(last_words(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"))
    inside = net.receiver(answer(), "127.0.0.2", port=good.port)
    client = net.client(Guard([ip_network("127.0.0.1/32")]))
    names["rebinds.test"] = [["127.0.0.1"], ["127.0.0.2"]]
    url = good.url(host="rebinds.test")
    assert net.ask(url, client=client) == [Response(200, "")]
    assert names.asked == ["rebinds.test"], "looked up again after it was judged"
    net.until(lambda: client.connections == 0)
    [result] = net.ask(url, client=client)
    assert isinstance(result, ForbiddenError)
    assert names.asked == ["rebinds.test"] * 2
    assert (good.accepted, inside.accepted) == (1, 0)


def test_an_unknown_name_is_an_error(net: Net, names: Names) -> None:
    assert net.error(parse(b"http://nobody.test/")) == "Name or service not known"
    assert net.error(parse(b"http://nobody.test/")) == "Name or service not known"
    assert names.asked == ["nobody.test"]


def test_a_name_without_addresses_is_an_error(net: Net, names: Names) -> None:
    names["empty.test"] = [[]]
    assert net.error(parse(b"http://empty.test/"))


def test_a_look_up_is_shared_and_kept_for_a_while(net: Net, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver, other = net.receiver(answer()), net.receiver(answer())
    names["a.test"] = [["127.0.0.1"]]
    names.gates["a.test"] = threading.Event()
    calls = [net.send(where.url(host="a.test")) for where in (receiver, other) for _ in range(9)]
    net.until(lambda: names.asked)
    net.spin()
    names.gates["a.test"].set()
    net.finish(*calls)
    assert names.asked == ["a.test"]
    third = net.receiver(answer())
    assert net.status(third.url(host="a.test")) == 200
    assert names.asked == ["a.test"]
    monkeypatch.setattr(outbound, "LOOKUP_TIME", -1.0)  # that was long ago
    assert net.status(net.receiver(answer()).url(host="a.test")) == 200
    assert names.asked == ["a.test"] * 2


def test_a_look_up_that_hangs_holds_up_no_other_origin(net: Net, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = net.receiver(answer())
    names["a.test"] = names["lost.test"] = [["127.0.0.1"]]
    names.gates["lost.test"] = threading.Event()
    stuck = [net.send(receiver.url(host="lost.test")) for _ in range(5)]
    net.until(lambda: names.asked)
    assert net.ask(receiver.url(host="a.test"), receiver.url()) == [Response(200, "")] * 2
    assert not any(call.results for call in stuck)
    names.gates["lost.test"].set()
    net.finish(*stuck)
    assert {call.status for call in stuck} == {200}


def test_a_look_up_that_takes_too_long_is_an_error(net: Net, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    names.gates["lost.test"] = threading.Event()
    results = net.ask(*[parse(b"http://lost.test/")] * 3)
    assert {str(result) for result in results} == {"no connection in time"}
    net.until(lambda: net.plain.connections == 0)


def test_a_look_up_that_takes_too_long_leaves_no_traceback(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it any more when it fails; asyncio tells of such a failure when the task is forgotten."""
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    monkeypatch.setattr(outbound, "LOOKUP_TIME", -1.0)  # the second look-up takes the place of the first
    names.gates["lost.test"] = threading.Event()
    for _ in range(3):
        assert net.error(parse(b"http://lost.test/")) == "no connection in time"
    gc.collect()
    net.spin()
    assert net.errors == []


def test_a_look_up_that_one_gives_up_is_an_error_for_others_too(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An origin that asked later waits for the same look-up, and must not wait for ever."""
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    names.gates["lost.test"] = threading.Event()
    first = net.send(parse(b"http://lost.test:81/"))
    net.until(lambda: names.asked)
    net.run(asyncio.sleep(SHORT / 3))
    later = net.send(parse(b"http://lost.test:82/"))
    net.finish(first, later)
    assert (first.error, later.error) == ("no connection in time", "no connection in time")
    net.until(lambda: net.plain.connections == 0)


def test_so_many_names_are_looked_up_at_a_time(net: Net, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "LOOKUPS", 2)
    receiver = net.receiver(answer())
    for number in range(5):
        names[f"{number}.test"] = [["127.0.0.1"]]
        names.gates[f"{number}.test"] = threading.Event()
    calls = [net.send(receiver.url(host=f"{number}.test")) for number in range(5)]
    net.until(lambda: len(names.asked) == 2)
    net.spin()
    assert len(names.asked) == 2
    for gate in names.gates.values():
        gate.set()
    net.finish(*calls)
    assert {call.status for call in calls} == {200}


def test_look_ups_that_nobody_waits_for_count_until_they_end(
    net: Net, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbound, "LOOKUPS", 1)
    monkeypatch.setattr(outbound, "CONNECT_TIME", SHORT)
    receiver = net.receiver(answer())
    names["lost.test"] = names["a.test"] = names["b.test"] = [["127.0.0.1"]]
    names.gates["lost.test"] = threading.Event()
    assert net.error(receiver.url(host="lost.test")) == "no connection in time"
    assert net.error(receiver.url(host="a.test")) == "no connection in time"
    assert names.asked == ["lost.test"]
    names.gates["lost.test"].set()
    monkeypatch.setattr(outbound, "CONNECT_TIME", GUARD_TIME)
    assert net.status(receiver.url(host="b.test")) == 200


def test_without_a_thread_a_look_up_is_an_error(net: Net, names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "LOOKUPS", 1)
    receiver = net.receiver(answer())
    names["a.test"] = names["b.test"] = [["127.0.0.1"]]

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert net.error(receiver.url(host="a.test")) == "no thread to look the name up"
    assert net.status(receiver.url(host="b.test")) == 200
