"""Where Redis is: what a URL says, read by redis-py's public `parse_url`, and what sentinels say.

A node is given a way to find its server, and asks it before each connection. A URL of `redis://`, `rediss://` or
`unix://` names the server itself. It may have several addresses: they are tried in turn, the one that worked last
first, and a write on arrival proves that the server is a primary. Of a cluster they are nodes to ask for the others.

A URL of `redis+sentinel://` or `rediss+sentinel://` names sentinels, which watch over a primary and its replicas and
agree on another primary when it is gone. All of them are asked at the same time, and the answer with the highest
config-epoch counts, which is the newest that any of them has heard of. With TLS to the primary the sentinels are asked
with TLS, too, by the same files: a sentinel has a port for TLS if and only if it reaches the servers with TLS
(`tls-replication yes`).

After a failover that somebody asked for, the old primary goes on acknowledging for seconds. So while a link stands
the sentinels are asked again every ASK seconds, and it is left when they name another server. Ids that the old one
acknowledged meanwhile are stored again on the new one, as after any loss of data. A count would not be made good: so
they are asked before each ROLL, too, and who is late closes nothing that others still fill on the new primary.
"""

import asyncio
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
PORT, SENTINEL_PORT = 6379, 26379
DEFAULTS = {"host": "localhost", "port": PORT, "db": 0}  # of redis-py's URLs


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
    """Return the URL of the server, the hosts and ports that are named, and the primary's name if they are sentinels.

    Where there are hosts, the one in the server's URL stands for any of them; there are none for a unix socket.
    """
    scheme, _, rest = url.partition("://")
    if scheme.lower() == "unix":
        return url, [], ""
    server = rest.replace("?", "/", 1).partition("/")[0]
    path, mark, query = rest[len(server) :].partition("?")
    login, at, named = server.rpartition("@")
    direct = scheme.lower().removesuffix("+sentinel")
    primary, port = "", PORT
    if direct != scheme.lower():
        primary, _, path = path[1:].partition("/")
        path, port = f"/{path}", SENTINEL_PORT
    parsed = [urlsplit(f"//{host}") for host in named.split(",")]
    hosts = [(unquote(host.hostname or "localhost"), host.port or port) for host in parsed]
    return f"{direct}://{login}{at}localhost{path}{mark}{query}", hosts, unquote(primary)


def place(url: str) -> str:
    """Return where a Redis URL leads, in words and without its secrets."""
    direct, hosts, primary = split(url)
    found = address(direct)
    where = found.path or ", ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in hosts)
    return f"Redis at {f'{primary}, of the sentinels ' if primary else ''}{where}, database {found.database}"


class Topology:
    """Finds the server that a URL leads to."""

    def __init__(self, url: str, sentinel_password: str = "") -> None:
        """Raises ValueError if the URL is none."""
        direct, hosts, self._primary = split(url)
        self._server = address(direct)
        named = [replace(self._server, host=host, port=port) for host, port in hosts]
        sentinels = named if self._primary else []
        self._sentinels = [replace(each, username="", password=sentinel_password) for each in sentinels]
        self._servers = [self._server] if sentinels else named or [self._server]
        self._turn = 0  # which of the servers is tried next
        self.others = len(self._servers) - 1  # how many may be tried in vain before the one that works
        # Seconds in which a switch is noticed, besides what a connection tells: until asked, and answered by all.
        self.notices = 2 * ASK if sentinels else 0.0
        self._wires: dict[Address, Wire] = {}  # to sentinels
        self._asking = asyncio.Lock()

    async def find(self) -> Address:
        """Return how to connect to the server, as of now. Raises redis.ConnectionError if no sentinel tells."""
        if not self._sentinels:
            return self._servers[self._turn]
        async with self._asking:
            answers = await asyncio.gather(*map(self._ask, self._sentinels), return_exceptions=True)
        known = [answer for answer in answers if isinstance(answer, tuple)]
        if known:
            _, host, port = max(known, key=lambda answer: answer[0])
            return replace(self._server, host=host, port=port)
        why = f"no sentinel names the primary {self._primary}: "
        errors = [redis.ConnectionError(why + (str(answer) or "no answer")) for answer in answers]
        raise next((error for error in errors if advice_in(advise(error))), errors[0])

    def turn(self) -> None:
        """Have the next of several addresses found from now on: the one found last did not work."""
        self._turn = (self._turn + 1) % len(self._servers)

    def seeds(self) -> list[Address]:
        """Return the nodes of a cluster to ask first. Raises ValueError, in words, if the URL can't lead to one."""
        if self._sentinels:
            raise ValueError("the sentinels name a node of a cluster: write redis:// and nodes of it in --redis-url")
        if self._server.database:
            raise ValueError(
                "--redis-url leads to a cluster, of which only database 0 is used: "
                f"expected no database in it, got {self._server.database}"
            )
        return self._servers

    async def confirm(self, used: Address) -> None:
        """Raise redis.ConnectionError if sentinels name another server; while none answers, the last named counts."""
        if not self._sentinels:
            return
        try:
            found = await self.find()
        except redis.ConnectionError:
            return
        if found != used:
            raise redis.ConnectionError(f"the primary {self._primary} is {found.host}:{found.port} now")

    async def follow(self, used: Callable[[], Address | None], leave: Callable[[Exception], None]) -> None:
        """Have a link left when the sentinels name another server; `used` returns the address while the link stands."""
        while self._sentinels:
            await asyncio.sleep(ASK)
            before = used()
            if before is None:
                continue
            try:
                await self.confirm(before)
            except redis.ConnectionError as error:
                if used() == before:
                    leave(error)

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
