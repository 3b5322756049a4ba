"""The HTTP/1.1 client: one exchange at a time on each of a few connections to an origin.

    url = parse(b"http://example.com/seen")
    client.send(url, request(url, "GET", url.target), done, repeatable=True)    # done(Response | OutboundError), once

An origin is scheme, host and port. Each origin has a queue and at most CONNECTIONS connections. A connection that has
finished an exchange takes the next from the queue; if there is none, it is kept open for a while. So a slow or dead
origin delays only its own exchanges. There is no task for each exchange: its end is a call of `done`. All origins
together have at most ALL_CONNECTIONS; the second half of these is for origins that have none yet. So what can delay
other origins is ALL_CONNECTIONS origins that hang at once, or LOOKUPS names whose look-up hangs.

Every exchange ends, at the latest QUEUE_TIME and EXCHANGE_TIME after it was asked for: with the status of a response,
or with an error that says why there is none. A server may close an idle connection just when a request is sent on it.
If no byte of an answer came, a request that may be repeated (RFC 9110, 9.2.2) is sent once more, on a new connection.
In all other cases a request is sent once. The status counts as soon as the head of the response is whole; an error in
the body changes nothing.

The address guard. A name is looked up and every address is checked. The connection goes to a checked address, not to
the name, so a resolver that answers something else the next time can do no harm. Public unicast addresses are allowed,
and those that the operator names. An IPv4 address inside an IPv6 address (mapped, NAT64, 6to4) is checked as the IPv4
address. A host that some resolvers take for an address and others for a name (`127.1`, `0x7f.1`, `2130706433`) is
refused. The metadata address of clouds is allowed only if it is named alone, not as part of a larger block.

A request is built from checked parts: a URL holds only visible ASCII characters, so it can't add a line to the request.
"""

import asyncio
import base64
import contextlib
import math
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final, NamedTuple, cast
from urllib.parse import unquote_to_bytes

import httptools

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

CONNECTIONS: Final = 64  # to one origin
ALL_CONNECTIONS: Final = 1024  # to all origins together
QUEUE_TIME: Final = 30.0  # seconds that an exchange may wait for a connection
LOOKUPS: Final = 128  # names looked up at a time, each in a thread: getaddrinfo(3) blocks
CONNECT_TIME: Final = 3.0  # seconds for look-up, connection and TLS handshake together
EXCHANGE_TIME: Final = 5.0  # seconds from the request's first byte to the response's last
IDLE_TIME: Final = 15.0  # seconds that a connection without work is kept; many servers close after 60, some after 20
LOOKUP_TIME: Final = 5.0  # seconds that the result of a look-up is used for
SWEEP_TIME: Final = 1.0  # seconds between two checks of all deadlines
MAX_HEAD: Final = 32 * 1024  # bytes of a response before its body; more is an error
MAX_RESPONSE: Final = 96 * 1024  # bytes of a response; after more the connection is closed. Nobody uses the body
MAX_URL: Final = 4096  # bytes of a URL

# IANA's registries of special-purpose addresses: what is not globally reachable unicast. Written down, as Python's
# `is_global` has exceptions and changes with its version.
_CLOSED = [
    ip_network(block)
    for block in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "2001::/23", "2001:db8::/32", "3fff::/20"),
    )
]
_OPEN_6 = IPv6Network("2000::/3")  # of IPv6, all else is closed
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
METADATA = (ip_address("169.254.169.254"), ip_address("fd00:ec2::254"))

_url = re.compile(
    rb"(https?)://(?:([!$&-.0-;=A-Z_a-z~%]*)@)?"
    rb"(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]{1,253})(?::([0-9]{1,5}))?"
    rb"(/[!-\"$->@-~]*)?(\?[!-\"$-~]*)?(?:#[!-~]*)?",
    re.IGNORECASE,
).fullmatch
_name = re.compile(
    r"(?:[0-9a-z_](?:[0-9a-z_-]{0,61}[0-9a-z_])?\.)*[0-9a-z_](?:[0-9a-z_-]{0,61}[0-9a-z_])?\.?"
).fullmatch
_number_like = re.compile(r"[0-9]+|0x[0-9a-f]*").fullmatch  # a host whose last label matches is no name


class OutboundError(Exception):
    """Why an exchange has no response, in a few words."""


class DroppedError(OutboundError):
    """The exchange was taken from the queue and not sent."""


class ForbiddenError(OutboundError):
    """The host has no address that may be reached."""


class Url(NamedTuple):
    """An absolute http or https URL, in parts that are safe to be sent."""

    secure: bool
    host: str  # lower case; an IPv6 address without brackets
    port: int
    path: str
    query: str  # with its question mark, or empty
    authorization: str = ""  # value of the header, from the URL's user and password

    @property
    def origin(self) -> tuple[bool, str, int]:
        """Scheme, host and port: what a connection is good for."""
        return self[:3]

    @property
    def place(self) -> str:
        """Scheme, host and port in words: what of a URL may be logged."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}"

    @property
    def target(self) -> str:
        """Path and query (RFC 9112, 3.2.1)."""
        return self.path + self.query


def parse(text: bytes) -> Url:
    """Read a URL. Raises ValueError, in plain words that do not repeat it."""
    match = _url(text) if len(text) <= MAX_URL else None
    if match is None:
        raise ValueError("expected an absolute http or https URL")
    scheme, user, host, port, path, query = match.groups()
    secure = scheme.lower() == b"https"
    name = host.decode("ascii").lower()
    if name.startswith("["):
        try:
            name = str(IPv6Address(name[1:-1]))
        except ValueError:
            raise ValueError("expected an IPv6 address in brackets") from None
    else:
        labels = name.removesuffix(".").split(".")
        if _number_like(labels[-1]):
            try:
                name = str(IPv4Address(name))
            except ValueError:
                raise ValueError("expected an IPv4 address as four decimal numbers") from None
        elif not _name(name):
            raise ValueError("expected a host name or an address")
    number = int(port) if port else (443 if secure else 80)
    if not 0 < number < 65536:
        raise ValueError("expected a port from 1 to 65535")
    basic = ""
    if user is not None:
        pair = user if b":" in user else user + b":"  # RFC 7617
        basic = "Basic " + base64.b64encode(unquote_to_bytes(pair)).decode("ascii")
    return Url(secure, name, number, (path or b"/").decode("ascii"), (query or b"").decode("ascii"), basic)


def request(url: Url, method: str, target: str, fields: str = "", body: bytes = b"") -> bytes:
    """Return a request's bytes.

    `fields` are lines of the head, each with its CRLF; they and `target` must come from checked parts.
    """
    host = f"[{url.host}]" if ":" in url.host else url.host
    port = "" if url.port == (443 if url.secure else 80) else f":{url.port}"
    head = f"{method} {target} HTTP/1.1\r\nHost: {host}{port}\r\nUser-Agent: verve\r\n{fields}"
    if url.authorization:
        head += f"Authorization: {url.authorization}\r\n"
    if body or method == "POST":
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode("ascii") + b"\r\n" + body


class Guard:
    """Judges addresses: public unicast ones pass, and those in the `allow`ed blocks."""

    def __init__(self, allow: Sequence[Network] = (), *, everything: bool = False) -> None:
        self._allow = allow
        self._everything = everything

    def allows(self, address: Address) -> bool:
        """Return whether an address may be connected to."""
        if self._everything:
            return True
        inner = _inner(address)
        if inner in METADATA:
            return ip_network(inner) in self._allow
        if any(inner in block for block in self._allow):
            return True
        return (inner.version == 4 or inner in _OPEN_6) and not any(inner in block for block in _CLOSED)

    def allows_url(self, url: Url) -> bool:
        """Return False if the URL's host alone says that it may not be reached; names are judged when looked up."""
        if url.host.removesuffix(".").rpartition(".")[2] == "localhost":  # RFC 6761, 6.3
            return self.allows(IPv4Address("127.0.0.1")) or self.allows(IPv6Address("::1"))
        try:
            return self.allows(ip_address(url.host))
        except ValueError:
            return True


def _inner(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address leads to, or the address itself."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or IPv6Address(int(address))  # without its scope
    return address


class Response(NamedTuple):
    """What came back."""

    status: int
    retry_after: str  # the header's value, or empty


Done = Callable[[Response | OutboundError], None]


@dataclass(slots=True)
class _Exchange:
    """A request, and what to call with its result."""

    request: bytes
    done: Done
    since: float  # loop time at which it was asked for
    repeatable: bool  # the receiver may get it twice
    fresh: bool = False  # needs a new connection: the peer had closed the one it was sent on


class _Connection(asyncio.Protocol):
    """A connection to an origin, with an exchange under way or idle."""

    def __init__(self, origin: "_Origin") -> None:
        self.origin = origin
        self.transport: asyncio.Transport | None = None
        self.used = False  # it has been idle, so the peer may close it at any time
        self.deadline = 0.0  # loop time at which it is closed
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: _Exchange | None = None

    def begin(self, exchange: _Exchange) -> None:
        """Send a request."""
        assert self.transport is not None
        self._exchange = exchange
        self._heard = 0  # bytes of the answer
        self._status = 0  # 0 until the head of the response is whole; interim responses (RFC 9110, 15.2) do not count
        self._retry_after = ""
        self._complete = self._persists = False
        self.deadline = self.origin.client.loop.time() + EXCHANGE_TIME
        self.transport.write(exchange.request)

    def close(self, error: str = "") -> None:
        """Close the connection; what is under way ends with its status if that is known, else with `error`."""
        self._end(error)
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            self.close()  # an answer to nothing
            return
        self._heard += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.close("expected no change of protocol")
        except httptools.HttpParserError:
            self.close("the response is not HTTP/1.1")
        else:
            if self._heard > (MAX_RESPONSE if self._status else MAX_HEAD):
                self.close(f"the response's head is over {MAX_HEAD} bytes")
            elif self._complete and self._persists:
                self._end()
                self.origin.free(self)
            elif self._complete:
                self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        exchange = self._exchange
        if exchange and self.used and not self._heard and exchange.repeatable and not exchange.fresh:
            self._exchange = None
            self.origin.retry(exchange)
        else:
            self._end("the connection was closed before the response's end")
        del self._parser  # it holds methods of this object: a cycle
        self.origin.lost(self)

    def _end(self, error: str = "") -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            answer = Response(self._status, self._retry_after)
            self.origin.ended(exchange, answer if self._status else OutboundError(error))

    # What httptools calls

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("more than was asked for")  # which ends the parsing: what follows can't be trusted

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self._retry_after = value.decode("latin-1").strip()[:64]

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._status = status if status >= 200 else 0

    def on_message_complete(self) -> None:
        if self._status:  # an interim response is followed by another
            self._complete = True
            self._persists = self._parser.should_keep_alive()


class _Origin:
    """The queue and the connections of one origin."""

    def __init__(self, client: "Client", key: tuple[bool, str, int]) -> None:
        self.client = client
        self.key = key
        self.pending = 0  # exchanges that wait or are under way
        self.queue: deque[_Exchange] = deque()
        self.connections: set[_Connection] = set()
        self.idle: list[_Connection] = []
        self.connecting = 0

    def submit(self, exchange: _Exchange) -> None:
        """Carry out an exchange as soon as a connection is free."""
        self.pending += 1
        self.queue.append(exchange)
        if self.idle:
            self.idle.pop().begin(self.queue.popleft())
        else:
            self.grow()

    def grow(self) -> None:
        """Open another connection if there is work for it."""
        client = self.client
        count = len(self.connections) + self.connecting
        if self.connecting >= len(self.queue) or count >= client.per_origin:
            return
        if client.connections >= (client.in_all // 2 if count else client.in_all):
            if not count:
                client.make_room_for(self)
            return
        self.connecting += 1
        client.connections += 1
        client.spawn(self._connect())

    def free(self, connection: _Connection) -> None:
        """Give a connection that has ended its exchange the next one, keep it, or close it for another origin."""
        connection.used = True
        if self.queue and self.queue[0].fresh:
            connection.close()  # an old one: its peer may have closed it, too
        elif self.client.hungry and (len(self.connections) > 1 or not self.queue):
            connection.close()  # its place goes to an origin that has none
        elif self.queue:
            connection.begin(self.queue.popleft())
        else:
            connection.deadline = self.client.loop.time() + IDLE_TIME
            self.idle.append(connection)

    def retry(self, exchange: _Exchange) -> None:
        """Carry out an exchange again, on a new connection."""
        exchange.fresh = True
        while self.idle:  # their peer may have closed them, too
            self.idle.pop().close()
        self.queue.appendleft(exchange)
        self.grow()

    def lost(self, connection: _Connection) -> None:
        """Forget a connection."""
        if connection not in self.connections:
            return  # it was lost while it was opened: `_connect` handles that
        self.connections.remove(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        self.client.released()
        self.grow()

    def ended(self, exchange: _Exchange, result: Response | OutboundError) -> None:
        """Pass on the result of an exchange."""
        self.pending -= 1
        self.client.ended(exchange.done, result)

    def fail(self, error: OutboundError, until: float = math.inf) -> None:
        """End what waits and was asked for up to `until` (loop time); what `done` asks for meanwhile stays."""
        gone = []
        while self.queue and self.queue[0].since <= until:
            gone.append(self.queue.popleft())
        for exchange in gone:
            self.ended(exchange, error)

    async def _connect(self) -> None:
        since = self.client.loop.time()
        try:
            async with asyncio.timeout(CONNECT_TIME):
                connection = await self._open()
        except TimeoutError:
            error: OutboundError = OutboundError("no connection in time")
        except OutboundError as refusal:
            error = refusal
        except ssl.SSLError as failure:
            error = OutboundError(f"TLS failed: {failure.reason or 'certificate not accepted'}")
        except (OSError, ValueError) as failure:
            error = OutboundError(getattr(failure, "strerror", None) or str(failure) or type(failure).__name__)
        else:
            self.connecting -= 1
            self.connections.add(connection)
            if self.queue:
                connection.begin(self.queue.popleft())
            else:
                self.free(connection)
            self.grow()
            return
        self.connecting -= 1
        self.client.released()
        if not self.connections:  # else they go on with the queue
            self.fail(error, since)  # what was asked for later gets an attempt of its own
            self.grow()

    async def _open(self) -> _Connection:
        """Return a connection to the first address that takes one."""
        secure, host, port = self.key
        addresses = [address for address in await self.client.look_up(host) if self.client.guard.allows(address)]
        if not addresses:
            raise ForbiddenError("the host has no address that may be reached")
        last = OSError()
        for address in addresses:
            try:
                async with asyncio.timeout(CONNECT_TIME / len(addresses)):
                    _, connection = await self.client.loop.create_connection(
                        lambda: _Connection(self),
                        str(address),
                        port,
                        ssl=self.client.tls if secure else None,
                        server_hostname=host.removesuffix(".") if secure else None,
                    )
            except OSError as error:  # TimeoutError is one
                last = error
            else:
                if connection.transport is not None:
                    return connection
                last = ConnectionResetError("closed at once")
        raise last


class Client:
    """Sends requests to any number of origins."""

    def __init__(self, guard: Guard, per_origin: int = CONNECTIONS, in_all: int = ALL_CONNECTIONS) -> None:
        """`per_origin` and `in_all` bound the connections that are open, to one origin and to all."""
        self.guard = guard
        self.per_origin = per_origin
        self.in_all = in_all
        self.loop = asyncio.get_running_loop()
        self.connections = 0  # open or opening
        self.pending = 0  # exchanges that wait or are under way
        self._origins: dict[tuple[bool, str, int], _Origin] = {}
        self.hungry: dict[_Origin, None] = {}  # origins that wait for their first connection; an ordered set
        self._names: dict[str, tuple[float, asyncio.Task[list[Address]]]] = {}  # time and result of the look-ups
        self._resolvers = ThreadPoolExecutor(LOOKUPS, "resolver")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._settled = asyncio.Event()
        self._settled.set()
        self._closed = False
        self._sweep = self.loop.call_later(SWEEP_TIME, self.sweep)

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """The settings of TLS: verified by the system's authorities, made when first needed."""
        tls = ssl.create_default_context()
        tls.set_alpn_protocols(["http/1.1"])
        return tls

    def send(self, url: Url, request: bytes, done: Done, *, repeatable: bool) -> None:
        """Send a request to the URL's origin. Later `done` is called once, with the response or the error.

        What is `repeatable` may arrive twice: GET always is (RFC 9110, 9.2.2).
        """
        if self._closed:
            self.loop.call_soon(done, OutboundError("stopped"))
            return
        origin = self._origins.get(url.origin)
        if origin is None:
            origin = self._origins[url.origin] = _Origin(self, url.origin)
        self.pending += 1
        self._settled.clear()
        origin.submit(_Exchange(request, done, self.loop.time(), repeatable))

    async def exchange(self, url: Url, request: bytes) -> Response:
        """Send a request, which may arrive twice, and return the response. Raises OutboundError."""
        answer: asyncio.Future[Response | OutboundError] = self.loop.create_future()

        def done(result: Response | OutboundError) -> None:
            if not answer.done():  # the caller may have been cancelled
                answer.set_result(result)

        self.send(url, request, done, repeatable=True)
        result = await answer
        if isinstance(result, OutboundError):
            raise result
        return result

    def waiting(self, url: Url) -> int:
        """Return how many exchanges of the URL's origin wait or are under way."""
        origin = self._origins.get(url.origin)
        return origin.pending if origin else 0

    def drop(self, url: Url, error: OutboundError) -> None:
        """End what waits for the URL's origin, but not what is under way."""
        origin = self._origins.get(url.origin)
        if origin is not None:
            origin.fail(error)

    async def settle(self) -> None:
        """Wait until nothing is pending."""
        while self.pending:
            await self._settled.wait()

    def ended(self, done: Done, result: Response | OutboundError) -> None:
        """Note that an exchange is over and call `done`; an error in that must not harm other exchanges."""
        self.pending -= 1
        if not self.pending:
            self._settled.set()
        try:
            done(result)
        except Exception as error:
            self.loop.call_exception_handler({"message": "a callback of outbound.Client failed", "exception": error})

    def make_room_for(self, origin: _Origin) -> None:
        """Give an origin the next connection that another gives up, and have an idle one closed for it."""
        if origin in self.hungry:
            return
        self.hungry[origin] = None
        for other in self._origins.values():
            if other.idle:
                other.idle.pop(0).close()
                return

    def released(self) -> None:
        """Note that a connection is gone."""
        self.connections -= 1
        while self.hungry and self.connections < self.in_all:
            origin = next(iter(self.hungry))
            del self.hungry[origin]
            origin.grow()

    def sweep(self) -> None:
        """End what is past its deadline; forget origins without work and old look-ups. Runs every SWEEP_TIME."""
        self._sweep = self.loop.call_later(SWEEP_TIME, self.sweep)
        now = self.loop.time()
        for key, origin in list(self._origins.items()):
            for connection in [c for c in origin.connections if c.deadline < now]:
                connection.close(f"no response within {EXCHANGE_TIME:g} s")
            origin.fail(DroppedError(f"waited {QUEUE_TIME:g} s for a connection"), now - QUEUE_TIME)
            if not (origin.connections or origin.connecting or origin.queue):
                self.hungry.pop(origin, None)
                del self._origins[key]
        for name in [name for name, (since, _) in self._names.items() if since < now - LOOKUP_TIME]:
            del self._names[name]

    def close(self) -> None:
        """Close everything; what waits ends with an error."""
        self._closed = True
        self._sweep.cancel()
        for task in self._tasks:
            task.cancel()
        self._resolvers.shutdown(wait=False, cancel_futures=True)
        for origin in list(self._origins.values()):
            self.connections -= origin.connecting
            origin.connecting = 0
            origin.fail(OutboundError("stopped"))
            for connection in list(origin.connections):
                connection.close("stopped")

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in the background, with a reference that keeps it alive."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def look_up(self, host: str) -> list[Address]:
        """Return a host's addresses, as looked up within the last LOOKUP_TIME seconds. Raises OSError."""
        with contextlib.suppress(ValueError):
            return [ip_address(host)]
        since, task = self._names.get(host, (-math.inf, None))
        if task is None or since < self.loop.time() - LOOKUP_TIME:
            task = self.spawn(self._resolve(host))
            task.add_done_callback(_known)
            self._names[host] = self.loop.time(), task
        return await asyncio.shield(task)  # others may wait for it too

    async def _resolve(self, host: str) -> list[Address]:
        async with asyncio.timeout(CONNECT_TIME):  # a thread is busy until its look-up ends, however long that takes
            try:
                return await self.loop.run_in_executor(self._resolvers, resolve, host)
            except RuntimeError:
                raise OSError("no thread to look the name up") from None


def _known(look_up: asyncio.Task[Any]) -> None:
    """Take note of how a look-up ended: if nobody waits any more, asyncio would log its error with a traceback."""
    if not look_up.cancelled():
        look_up.exception()


def resolve(host: str) -> list[Address]:
    """Look a host up, which blocks; return its addresses. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(address[0]) for *_, address in found))
