"""Real clusters of Redis or Valkey on this machine, up in some two seconds, and what can happen to them.

    with clusters.Cluster("valkey") as cluster:  # three primaries, each with a replica
        home = cluster.primary_of("verve:reports")
        (replica,) = cluster.replicas_of(home)
        home.kill()
        cluster.wait_until_promoted(replica)
        home.start()  # empty, unless the cluster persists
        cluster.settle()

The nodes are put together by plain commands, as `redis-cli --cluster create` does it. Whoever asks where a slot is gets
the answer from the nodes themselves: of those that say that they have it, the one with the highest epoch has it. A node
that is stopped in its tracks is not asked. Nodes tell nobody when they agree, so they are asked again and again.

A replica may be promoted by votes that it was given in an election before (seen on Redis 7.0.15): it then leads in its
own eyes only, and is emptied by its old primary as soon as that is back. So before a primary dies there is a `rest`.
"""

import binascii
import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import redis
import redis_tls
import servers

SLOTS = 16_384
NODE_TIMEOUT = 1.0  # seconds without an answer after which nodes take one of them for gone
VOTES = 4  # node time-outs for which a vote counts
MOVE_TIME = 5000  # milliseconds that the keys of a slot may take from node to node
DURABLE = ("--appendonly", "yes", "--appendfsync", "no")  # the kernel has what is written, which is enough for kill -9


def slot_of(key: str) -> int:
    """Return the slot of a key: that of its hash tag, if it has one."""
    tag = re.search(r"\{(.+?)\}", key) if re.match(r"[^{]*\{[^}]", key) else None
    return binascii.crc_hqx((tag[1] if tag else key).encode(), 0) % SLOTS


def wait_until(true: Callable[[], Any], what: str) -> None:
    """Wait for what nobody tells."""
    until = time.monotonic() + servers.DEADLINE
    while not true():
        assert time.monotonic() < until, f"not {what}"
        time.sleep(0.03)


class State(NamedTuple):
    """What a node says of itself."""

    name: str
    primary: str  # the name of the one that it follows; empty if it is a primary
    epoch: int
    slots: frozenset[int]


class Node(servers.Redis):
    """One server of a cluster. It keeps its name, its slots and whom it knows when it is started again."""

    def __init__(
        self, engine: str, *options: str, persist: bool = False, password: str = "", tls: redis_tls.Files | None = None
    ) -> None:
        """With `tls`, for which the engine must be built, the nodes speak TLS to each other, and to clients as well."""
        self.bus = servers.free_port()
        self.still = False  # stopped in its tracks
        flags = {
            "enabled": "yes",
            "port": str(self.bus),  # else it is 10,000 above the other, where other tests may have a server
            "replica-validity-factor": "0",  # a replica may be promoted however long it was cut off
            "allow-replica-migration": "no",  # a node without slots stays a primary
        }
        words = [word for name, value in flags.items() for word in (f"--cluster-{name}", value)]
        words += ["--masterauth", password] if password else []
        words += DURABLE if persist else ()
        self.tls_port = 0
        if tls is not None:
            self.tls_port = servers.free_port()
            words += redis_tls.options(self.tls_port, tls, ask_clients=False)
            words += ["--tls-cluster", "yes", "--tls-replication", "yes"]
        super().__init__(engine, *words, *options, password=password)
        self.name = str(self.tell("CLUSTER", "MYID"))

    def __repr__(self) -> str:
        return f"node {self.port}"

    def tell(self, *words: str | int) -> Any:
        """Have it carry out a command."""
        with self.client() as client:
            return client.execute_command(*words)

    def freeze(self) -> None:
        self.still = True
        super().freeze()

    def thaw(self) -> None:
        super().thaw()
        self.still = False

    def kill(self, *args: Any) -> None:
        super().kill(*args)
        self.still = False

    def start_empty(self) -> None:
        """Start it without the data that it had, as the same member of the cluster."""
        shutil.rmtree(Path(self.folder.name, "appendonlydir"), ignore_errors=True)
        self.start()

    def cut(self) -> None:
        """End the connections of all its clients; those to other nodes stay."""
        self.tell("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def state(self) -> State | None:
        """Return what it says of itself, if it can be asked."""
        if self.process is None or self.still:
            return None
        try:
            said = self.tell("CLUSTER", "NODES")
        except redis.RedisError:
            return None
        line = next(line for line in said.splitlines() if "myself" in line)
        name, _, flags, primary, _, _, epoch, _, *ranges = line.split()
        found: set[int] = set()
        for each in ranges:
            if not each.startswith("["):  # a slot on its way
                first, _, last = each.partition("-")
                found.update(range(int(first), int(last or first) + 1))
        return State(name, primary if "slave" in flags else "", int(epoch), frozenset(found))

    def is_well(self, count: int) -> bool:
        """Whether it finds the cluster well, knows `count` nodes, and has all of its primary's data."""
        with contextlib.suppress(redis.RedisError), self.client() as client:
            info = dict(line.split(":") for line in str(self.tell("CLUSTER", "INFO")).split())
            replication: Any = client.info("replication")
            linked = replication["role"] == "master" or replication["master_link_status"] == "up"
            return linked and info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == count
        return False


class Cluster:
    """Some primaries, each with some replicas, which share all slots evenly."""

    def __init__(
        self,
        engine: str,
        primaries: int = 3,
        replicas: int = 1,
        *,
        persist: bool = False,
        password: str = "",
        full_coverage: bool = False,
        tls: redis_tls.Files | None = None,
        timeout: float = NODE_TIMEOUT,
    ) -> None:
        """Start them.

        `replicas` is how many each primary has. With `persist` a node that is killed keeps its data; with
        `full_coverage` none takes a key while a slot is away. On a busy machine nodes with a short `timeout` fail over
        by themselves.
        """
        self.engine = engine
        self.nodes: list[Node] = []
        self._password = password
        self._options = [
            *("--cluster-require-full-coverage", "yes" if full_coverage else "no"),
            *("--cluster-node-timeout", str(int(1000 * timeout))),
        ]
        self._persist = persist
        self._timeout = timeout
        self._tls = tls
        self._elected = 0.0  # monotonic time of the last promotion
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._begin(primaries, replicas)
            self._stack = stack.pop_all()

    def _begin(self, primaries: int, replicas: int) -> None:
        nodes = [self._start() for _ in range(primaries * (1 + replicas))]
        heads = nodes[:primaries]
        for epoch, node in enumerate(nodes, 1):
            node.tell("CLUSTER", "SET-CONFIG-EPOCH", epoch)
        for number, node in enumerate(heads):
            first, after = (SLOTS * each // primaries for each in (number, number + 1))
            node.tell("CLUSTER", "ADDSLOTSRANGE", first, after - 1)
        wait_until(lambda: self._have_met(nodes), "acquainted")
        for number, node in enumerate(nodes[primaries:]):
            self._follow(node, heads[number % primaries])
        self.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """The URL that names all nodes."""
        addresses = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"redis://{':' + self._password + '@' if self._password else ''}{addresses}"

    def _start(self) -> Node:
        node = Node(self.engine, *self._options, persist=self._persist, password=self._password, tls=self._tls)
        self.nodes.append(self._stack.enter_context(node))
        return node

    @staticmethod
    def _have_met(nodes: Sequence[Node]) -> bool:
        """Have nodes meet that do not know each other; return whether all did before.

        On a busy machine a handshake may take longer than the node time-out, and is then forgotten.
        """
        missing = 0
        for number, node in enumerate(nodes):
            lines = str(node.tell("CLUSTER", "NODES")).splitlines()
            known = {line.split()[0] for line in lines if "handshake" not in line}
            for other in nodes[:number]:
                if other.name not in known:
                    missing += 1
                    node.tell("CLUSTER", "MEET", "127.0.0.1", other.port, other.bus)
        return not missing

    def _follow(self, node: Node, primary: Node) -> None:
        def done() -> bool:
            with contextlib.suppress(redis.ResponseError):  # until it knows the other
                node.tell("CLUSTER", "REPLICATE", primary.name)
                return True
            return False

        wait_until(done, f"{node} a replica of {primary}")

    # Who has what

    def states(self) -> dict[Node, State]:
        """Return what those nodes say of themselves that can be asked."""
        return {node: state for node in self.nodes if (state := node.state())}

    def primaries(self) -> dict[Node, frozenset[int]]:
        """Return the slots of those that have some, as the nodes say it that can be asked."""
        leaders: dict[int, tuple[int, Node]] = {}
        for node, state in self.states().items():
            if not state.primary:
                for slot in state.slots:
                    epoch, other = leaders.get(slot, (-1, node))
                    leaders[slot] = max(epoch, state.epoch), node if state.epoch > epoch else other
        found: dict[Node, set[int]] = {}
        for slot, (_, node) in leaders.items():
            found.setdefault(node, set()).add(slot)
        return {node: frozenset(slots) for node, slots in found.items()}

    def primary_of(self, key: str | int) -> Node:
        """Return the node that has a key, or a slot. Raises LookupError if none says so."""
        slot = key if isinstance(key, int) else slot_of(key)
        having = [
            (state.epoch, node) for node, state in self.states().items() if not state.primary and slot in state.slots
        ]
        if not having:
            raise LookupError(f"slot {slot} is away")
        return max(having, key=lambda pair: pair[0])[1]

    def replicas_of(self, primary: Node) -> list[Node]:
        """Return the nodes that follow a primary, which may be gone."""
        return [node for node, state in self.states().items() if state.primary == primary.name]

    # How it comes to rest

    def settle(self) -> None:
        """Wait until all nodes that run agree, all slots are there, and every replica has what its primary has."""
        try:
            wait_until(self._is_settled, "a cluster at rest")
        except AssertionError as error:
            for node in self.running():
                error.add_note(f"{node!r}: {node.tell('CLUSTER', 'NODES')}{node.tell('INFO', 'replication')}")
            raise

    def rest(self) -> None:
        """Settle, and wait until the votes of the last election count no more."""
        self.settle()
        time.sleep(max(0.0, self._elected + VOTES * self._timeout - time.monotonic()))

    def running(self) -> list[Node]:
        """Return the nodes that can be asked."""
        return [node for node in self.nodes if node.process and not node.still]

    def _is_settled(self) -> bool:
        running = self.running()
        if not all(node.is_well(len(self.nodes)) for node in running):
            return False
        views = {tuple(sorted(self._view(node))) for node in running}
        if len(views) > 1:
            return False
        leaders = self.primaries()
        return sum(map(len, leaders.values())) == SLOTS and {port for *_, port in views.pop()} == {
            node.port for node in leaders
        }

    @staticmethod
    def _view(node: Node) -> list[tuple[int, int, int]]:
        """Return first slot, last slot, and port of the primary that has them, as a node sees it."""
        with contextlib.suppress(redis.RedisError):
            return [(first, last, primary[1]) for first, last, primary, *_ in node.tell("CLUSTER", "SLOTS")]
        return []

    def wait_until_promoted(self, *replicas: Node) -> Node:
        """Wait until one of some replicas is a primary in the eyes of all nodes; return it."""
        ports = {replica.port: replica for replica in replicas}
        promoted: list[Node] = []

        def found() -> bool:
            views = [{port for *_, port in self._view(node)} for node in self.running()]
            promoted[:] = [ports[port] for port in set.intersection(*views) if port in ports]
            return bool(promoted)

        wait_until(found, "promoted")
        self._elected = time.monotonic()
        return promoted[0]

    # What happens to it

    def fail_over(self, replica: Node, how: str = "") -> None:
        """Have a replica take its primary's place, which lives: asked for it, or with `how` FORCE or TAKEOVER."""
        replica.tell("CLUSTER", "FAILOVER", *([how] if how else []))
        self.wait_until_promoted(replica)

    def lag(self, primary: Node) -> None:
        """Have the replicas of a node miss what is written from now on, until `lose_tail`."""
        for replica in self.replicas_of(primary):
            replica.lag(primary)

    def lose_tail(self, primary: Node) -> Node:
        """Kill a node whose replicas lag, wait until one of them has taken its place, and return that one."""
        primary.kill()
        lagging = [node for node in self.nodes if node.still]
        for node in lagging:
            node.thaw()
        return self.wait_until_promoted(*lagging)

    def move(self, slots: Iterable[int], source: Node, target: Node) -> float:
        """Move slots with their keys, one after the other; return how long the slowest of them took, in seconds."""
        slowest = 0.0
        password = ("AUTH", self._password) if self._password else ()
        with source.client() as giver, target.client() as taker:
            for slot in slots:
                since = time.monotonic()
                taker.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source.name)
                giver.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target.name)
                while keys := giver.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10):
                    # REPLACE: a connection that is cut behind RESTORE has left the key there, and here.
                    port = target.tls_port or target.port
                    words = ("127.0.0.1", port, "", 0, MOVE_TIME, "REPLACE", *password, "KEYS", *keys)
                    giver.execute_command("MIGRATE", *words)
                taker.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target.name)
                giver.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target.name)
                slowest = max(slowest, time.monotonic() - since)
        self.settle()
        return slowest

    def migrate(self, slots: Iterable[int], source: Node, target: Node) -> None:
        """Move slots with their keys all at once, which Valkey can since 9.0."""
        ordered = sorted(slots)
        firsts = [slot for slot in ordered if slot - 1 not in set(ordered)]
        lasts = [slot for slot in ordered if slot + 1 not in set(ordered)]
        ranges = [edge for pair in zip(firsts, lasts, strict=True) for edge in pair]
        source.tell("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", *ranges, "NODE", target.name)

        def done() -> bool:
            newest, *_ = source.tell("CLUSTER", "GETSLOTMIGRATIONS")
            fields = dict(zip(newest[::2], newest[1::2], strict=True)) if isinstance(newest, list) else newest
            assert fields["state"] not in ("failed", "canceled"), fields
            return bool(fields["state"] == "success")

        wait_until(done, "migrated")
        self.settle()

    def add(self) -> Node:
        """Add a primary that has no slots yet."""
        node = self._start()
        for other in self.nodes[:-1]:
            if other.process and not other.still:
                node.tell("CLUSTER", "MEET", "127.0.0.1", other.port, other.bus)
        self.settle()
        return node
