"""Where Redis is: what a URL says, read by redis-py's public `parse_url`, and what sentinels say.

A node is given a way to find its server, and asks it before each connection. A URL of `redis://`, `rediss://` or
`unix://` names the server itself. One of `redis+sentinel://` or `rediss+sentinel://` names sentinels, which watch over
a primary and its replicas and agree on another primary when it is gone. All of them are asked at the same time, and the
answer with the highest config-epoch counts, which is the newest that any of them has heard of. That the server is a
primary is proved by a write on arrival, not here. With TLS to the primary the sentinels are asked with TLS, too, by the
same files: a sentinel has a port for TLS if and only if it reaches the servers with TLS (`tls-replication yes`).

After a failover that somebody asked for, the old primary goes on acknowledging for seconds. So while a link stands
the sentinels are asked again every ASK seconds, and it is left when they name another server. Ids that the old one
acknowledged meanwhile are stored again on the new one, as after any loss of data.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, urlsplit

import redis.asyncio.connection

from redis_store.advice import advice_in, advise
from redis_store.wire import Address, Wire, connect, good

ASK = 0.5  # seconds from one question to the sentinels to the next, while a link stands; to hear of a promotion takes
# them up to a second, and of the 2 s that are promised from it there must be some left
ANSWER = 0.4  # seconds that a sentinel has to answer; one whose machine is gone must not hold up the others' answer
FIRST = 1.2  # seconds likewise, until one was reached: enough to find out whether its port expects TLS
SENTINEL_PORT = 26379
DEFAULTS = {"host": "localhost", "port": 6379, "db": 0}  # of redis-py's URLs


def address(url: str) -> Address:
    """Return how to connect to the server that a URL names. Raises ValueError."""
    parsed = redis.asyncio.connection.parse_url(url)
    tls = issubclass(parsed.get("connection_class", object), redis.asyncio.SSLConnection)
    options: dict[str, Any] = {**DEFAULTS, **parsed}
    return Address(
        host=options["host"],
        port=options["port"],
        path=options.get("path", ""),
        database=options["db"],
        username=options.get("username", ""),
        password=options.get("password", ""),
        tls=tls,
        ca_certs=options.get("ssl_ca_certs"),
        certfile=options.get("ssl_certfile"),
        keyfile=options.get("ssl_keyfile"),
        check_hostname=options.get("ssl_check_hostname", True),
    )


def split(url: str) -> tuple[str, list[tuple[str, int]], str]:
    """Return the URL of the server, the sentinels, and the primary's name.

    Where there are sentinels, the host in the server's URL stands for any; without them, the URL is as it was.
    """
    scheme, _, rest = url.partition("://")
    if not scheme.lower().endswith("+sentinel"):
        return url, [], ""
    server, _, tail = rest.partition("/")
    login, at, hosts = server.rpartition("@")
    path, mark, query = tail.partition("?")
    primary, _, database = path.partition("/")
    parsed = [urlsplit(f"//{host}") for host in hosts.split(",")]
    sentinels = [(host.hostname or "localhost", host.port or SENTINEL_PORT) for host in parsed]
    return f"{scheme[: -len('+sentinel')]}://{login}{at}localhost/{database}{mark}{query}", sentinels, unquote(primary)


def place(url: str) -> str:
    """Return where a Redis URL leads, in words and without its secrets."""
    direct, sentinels, primary = split(url)
    found = address(direct)
    where = found.path or f"{found.host}:{found.port}"
    if sentinels:
        where = f"{primary}, of the sentinels {', '.join(f'{host}:{port}' for host, port in sentinels)}"
    return f"Redis at {where}, database {found.database}"


class Topology:
    """Finds the server that a URL leads to."""

    def __init__(self, url: str, sentinel_password: str = "") -> None:
        """Raises ValueError if the URL is none."""
        direct, sentinels, self._primary = split(url)
        self._server = address(direct)
        self._sentinels = [
            replace(self._server, host=host, port=port, username="", password=sentinel_password)
            for host, port in sentinels
        ]
        # Seconds in which a switch is noticed, besides what a connection tells: until asked, and answered by all.
        self.notices = 2 * ASK if sentinels else 0.0
        self._wires: dict[Address, Wire] = {}  # to sentinels
        self._asking = asyncio.Lock()

    async def find(self) -> Address:
        """Return how to connect to the server, as of now. Raises redis.ConnectionError if no sentinel tells."""
        if not self._sentinels:
            return self._server
        async with self._asking:
            answers = await asyncio.gather(*map(self._ask, self._sentinels), return_exceptions=True)
        known = [answer for answer in answers if isinstance(answer, tuple)]
        if known:
            _, host, port = max(known, key=lambda answer: answer[0])
            return replace(self._server, host=host, port=port)
        why = f"no sentinel names the primary {self._primary}: "
        errors = [redis.ConnectionError(why + (str(answer) or "no answer")) for answer in answers]
        raise next((error for error in errors if advice_in(advise(error))), errors[0])

    async def follow(self, used: Callable[[], Address | None], leave: Callable[[Exception], None]) -> None:
        """Have a link left when the sentinels name another server; `used` returns the address while the link stands."""
        while self._sentinels:
            await asyncio.sleep(ASK)
            before = used()
            if before is None:
                continue
            with contextlib.suppress(redis.ConnectionError):  # while no sentinel answers, the server last named counts
                found = await self.find()
                if found != before == used():
                    leave(redis.ConnectionError(f"the primary {self._primary} is {found.host}:{found.port} now"))

    def close(self) -> None:
        """End the connections to sentinels."""
        for wire in self._wires.values():
            wire.abort(redis.ConnectionError("closed"))

    async def _ask(self, sentinel: Address) -> tuple[int, str, int]:
        """Return config-epoch, host and port of what a sentinel takes for the primary.

        The address is asked for by itself: in a failover the sentinel that leads it counts the new epoch already while
        SENTINEL MASTER still has the old address, and GET-MASTER-ADDR-BY-NAME the new one.
        """
        async with asyncio.timeout(ANSWER if self._wires else FIRST):
            wire = self._wires.get(sentinel)
            if wire is None or wire.closed.done():
                wire = self._wires[sentinel] = await connect(sentinel, ANSWER)
            asked = ("SENTINEL", "MASTER", self._primary), ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._primary)
            known, where = good(await wire.ask(asked, asyncio.get_running_loop().time() + ANSWER))
        fields = dict(zip(known[::2], known[1::2], strict=True))
        return int(fields[b"config-epoch"]), where[0].decode(), int(where[1])
