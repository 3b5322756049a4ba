"""The nodes of a cluster that is not there: databases of one plain server, and what each takes itself for.

A replica that lags, a stale primary and a restart that lost its tail are copies of a moment. What is in the slots is
kept, and the scripts are run, by a real Redis; which slot is where, what is answered with MOVED, and whether a replica
acknowledges, is made here.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import redis
import servers

import redis_store.scripts
import redis_store.wire

PARTS = 2
LENGTH = 4  # seconds of a window
EPOCH = 1_800_000_000 - 1000  # a loop's time is this much less than that of its clocks; it starts at an edge
PREFIX = "m"

COPY = """
for _, key in ipairs(redis.call('KEYS', '*')) do
  if string.match(key, ARGV[2]) then
    redis.call('COPY', key, key, 'DB', ARGV[1], 'REPLACE')
  end
end
"""
DROP = """
for _, key in ipairs(redis.call('KEYS', '*')) do
  if string.match(key, ARGV[1]) then
    redis.call('DEL', key)
  end
end
"""

Words = list[bytes]  # of a command


class Client:
    """A plain connection to the one server."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.settimeout(servers.DEADLINE)
        self._database = -1

    def run(self, database: int, *commands: tuple[str | bytes, ...]) -> list[Any]:
        """Return the replies to commands on a database."""
        select: list[tuple[str | bytes, ...]] = [] if database == self._database else [("SELECT", str(database))]
        self._database = database
        packed = [redis_store.wire.pack(*command) for command in [*select, *commands]]
        self._socket.sendall(b"".join(packed))
        data = b""
        replies: list[Any] = []
        pos = 0
        while len(replies) < len(packed):
            try:
                reply, pos = redis_store.wire.parse(data, pos)
                replies.append(reply)
            except redis_store.wire.ShortError:
                data, pos = data[pos:] + self._socket.recv(1 << 16), 0
        return replies[len(select) :]

    def close(self) -> None:
        self._socket.close()


class Transaction:
    """What came since MULTI on a connection."""

    def __init__(self) -> None:
        self.commands: list[Words] | None = None
        self.broken = False  # an error was answered meanwhile


@dataclass(eq=False)
class Node:
    """One server: a database, and what it takes itself for."""

    nodes: "Nodes"
    number: int
    boots: int = 0
    up: bool = True
    frozen: bool = False
    lags: bool = False  # its replica acknowledges nothing
    minority: bool = False  # it answers CLUSTERDOWN
    stale: bool = False  # it does not know yet that it was replaced
    lost: float = -1e6  # when it may have lost data last
    skew: float = 0.0  # seconds that its clock is ahead
    believed: set[str] = field(default_factory=set)  # what a stale one takes for its own

    @property
    def host(self) -> str:
        return f"n{self.number}"

    @property
    def port(self) -> int:
        return 7000 + self.number

    @property
    def run_id(self) -> str:
        return f"run{self.number}.{self.boots}"

    @property
    def saved(self) -> int:
        """The database that has what it will find when it is started again."""
        return self.number + 8

    @property
    def replica(self) -> "Node | None":
        followers = [node for node in self.nodes.all if self.nodes.follows.get(node) is self]
        return next((node for node in followers if node.up and not node.stale), None)

    def serves(self, unit: str) -> bool:
        return unit in self.believed if self.stale else self.nodes.owners[unit] is self

    def reply(self, link: Transaction, words: Words) -> Any:
        """Return what it answers to a command."""
        name = words[0]
        if name == b"MULTI":
            link.commands, link.broken = [], False
            return b"OK"
        if name == b"EXEC":
            commands, link.commands = link.commands, None
            if link.broken or commands is None:
                return redis.ResponseError("EXECABORT Transaction discarded because of previous errors.")
            return self.keyed([*commands], multi=True)
        answer = self.plain(words)
        if answer is not None:
            return answer
        unit = self.nodes.unit_of(words[3] if name == b"EVAL" else words[1])
        error = self.refusal(unit)
        if error is None and link.commands is not None:
            link.commands.append(words)
            return b"QUEUED"
        if error is not None:
            link.broken = True
        return error if error is not None else self.keyed([words])

    def refusal(self, unit: str) -> redis.ResponseError | None:
        if self.minority:
            return redis.ResponseError("CLUSTERDOWN The cluster is down")
        if self.serves(unit):
            return None
        owner = self.nodes.owners[unit]
        return redis.ResponseError(f"MOVED {self.nodes.slots[unit]} {owner.host}:{owner.port}")

    def plain(self, words: list[bytes]) -> Any:
        """Return the answer to a command without keys; None if it has some."""
        match words:
            case [b"INFO", b"server"]:
                return f"redis_version:7.0.15\r\nredis_mode:cluster\r\nrun_id:{self.run_id}\r\n".encode()
            case [b"INFO", b"memory"]:
                return b"maxmemory:0\r\nmaxmemory_policy:noeviction\r\n"
            case [b"INFO", b"replication"]:
                return b"slave0:state=online\r\n" if self.replica else b""
            case [b"CLUSTER", b"SLOTS"]:
                return [self.nodes.range_of(unit, self) for unit in self.nodes.owners]
            case [b"WAIT", *_]:
                return int(self.synchronise())
            case [b"PING"]:
                return b"PONG"
        return None

    def keyed(self, commands: list[list[bytes]], multi: bool = False) -> Any:
        """Carry out commands on its database."""
        time = EPOCH + self.nodes.now() + self.skew
        clock: list[tuple[str | bytes, ...]] = [
            ("DEL", "clock"),
            ("RPUSH", "clock", str(int(time)), str(int(time % 1 * 1e6))),
        ]
        around: tuple[list[tuple[str | bytes, ...]], ...] = ([("MULTI",)], [("EXEC",)]) if multi else ([], [])
        asked = [*clock, *around[0], *map(tuple, commands), *around[1]]
        reply = self.nodes.client.run(self.number, *asked)[-1]
        if commands[0][0] == b"EVAL":
            self.nodes.ran(self, commands[0], reply)
        return reply

    def synchronise(self) -> bool:
        """Have its replica have all that it has; return whether it could."""
        replica = self.replica
        if replica is None or self.lags or self.stale or replica.frozen:
            return False
        self.nodes.copy(self.number, replica.number)
        return True


class Nodes:
    """All nodes: which slot is where, and who follows whom. A slot's name is "home", or "p" and a part's number."""

    def __init__(self, client: Client, now: Callable[[], float], ran: Callable[[Node, Words, Any], None]) -> None:
        """`now` is the loop's time; `ran` is told of each script, and what it returned."""
        self.client = client
        self.now = now
        self.ran = ran
        self.all = [Node(self, number) for number in range(4)]
        self.follows: dict[Node, Node] = {}  # replicas, and their primaries
        self.owners = {"home": self.all[0], "p0": self.all[0], "p1": self.all[1]}
        self.keys = redis_store.scripts.Keys(PREFIX, LENGTH, PARTS)
        self.parts = self.keys.parts(PARTS)
        self.tags = {key.mark.partition("{")[2].partition("}")[0]: f"p{n}" for n, key in enumerate(self.parts)}
        self.slots = {f"p{n}": redis_store.scripts.slot_of(key.mark) for n, key in enumerate(self.parts)}
        self.slots["home"] = redis_store.scripts.slot_of(self.keys.stream)

    @property
    def home(self) -> Node:
        return self.owners["home"]

    def of_part(self, part: int) -> Node:
        return self.owners[f"p{part}"]

    def unit_of(self, key: bytes) -> str:
        """Return whose slot a key is in."""
        tag = key.decode().partition("{")[2].partition("}")[0]
        return self.tags.get(tag, "home")

    def range_of(self, unit: str, asked: Node) -> list[Any]:
        owner = asked if asked.stale and unit in asked.believed else self.owners[unit]
        replicas = [owner.replica] if owner.replica else []
        each = [[node.host.encode(), node.port, b"id", []] for node in [owner, *replicas]]
        return [self.slots[unit], self.slots[unit], *each]

    def pattern_of(self, unit: str) -> str:
        if unit == "home":
            return f"{PREFIX}:reports"
        return next(f"^{PREFIX}:{{{tag}}}:" for tag, part in self.tags.items() if part == unit)

    def copy(self, source: int, target: int, unit: str = "") -> None:
        """Make one database what another is, or one unit of it."""
        pattern = self.pattern_of(unit) if unit else "."
        self.client.run(target, ("EVAL", DROP, "0", pattern))
        self.client.run(source, ("EVAL", COPY, "0", str(target), pattern))

    # What may befall them

    def restart(self, node: Node, how: str = "whole") -> None:
        """Start a node that is down: as a replica if it was replaced, else with its data, as it was saved, or empty."""
        node.up, node.frozen, node.stale = True, False, False
        node.lost = self.now()
        if node in self.follows:
            self.copy(self.follows[node].number, node.number)
        elif how == "saved":
            self.copy(node.saved, node.number)
        elif how == "empty":
            self.client.run(node.number, ("FLUSHDB",))

    def promote(self, replica: Node, stale: bool = False) -> None:
        """Have a replica take over."""
        primary = self.follows.pop(replica)
        replica.lost = self.now()
        if primary.up and stale:
            primary.stale = True
            primary.believed = {unit for unit, owner in self.owners.items() if owner is primary}
        for unit, owner in self.owners.items():
            if owner is primary:
                self.owners[unit] = replica
        self.follows[primary] = replica
        if primary.up and not stale:
            self.heal(primary)

    def heal(self, node: Node) -> None:
        """Have a replaced primary learn of it."""
        node.stale = False
        if node in self.follows:
            self.copy(self.follows[node].number, node.number)

    def move(self, unit: str, node: Node) -> None:
        """Move a slot."""
        self.copy(self.owners[unit].number, node.number, unit)
        self.client.run(self.owners[unit].number, ("EVAL", DROP, "0", self.pattern_of(unit)))
        self.owners[unit] = node
        node.lost = self.now()

    def flush(self, node: Node) -> None:
        node.lost = self.now()
        self.client.run(node.number, ("FLUSHDB",))
