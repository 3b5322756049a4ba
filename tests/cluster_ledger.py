"""What must hold of a cluster and its fleet: every id once, every window once, and no count that changes.

It is told what the scripts did. CLOSE leaves the set that it counted to be read, and REPORT the counts that it added
up, so it is known of each id which report it is in.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from cluster_nodes import EPOCH, LENGTH, PARTS, Client, Node, Nodes, Words

READ = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind = redis.call('TYPE', key).ok
  if kind == 'set' then
    found[#found + 1] = {key, redis.call('SMEMBERS', key)}
  elseif kind == 'string' then
    found[#found + 1] = {key, redis.call('GET', key)}
  end
end
return found
"""


class Teller(Protocol):
    """An instance, as far as it tells counts."""

    number: int
    acked: set[int]
    heard: list[tuple[int, int]]

    @property
    def known(self) -> set[int]:
        """Windows of whose reports it knows."""

    def lived_through(self, last: int) -> set[int]:
        """Return the windows before `last` that it must have told."""


class Ledger:
    """Where every id is, and which counts were told."""

    def __init__(self, client: Client, scripts: Mapping[bytes, str]) -> None:
        """`scripts` are the names of the scripts."""
        self.client = client
        self.scripts = scripts
        self.nodes: Nodes  # assigned before anything runs
        self.errors: list[str] = []
        self.refused: set[int] = set()  # ids that were said to be in no window
        self.orphans: set[int] = set()  # ids acknowledged by who is dead
        self.excused: set[int] = set()  # those of them that Redis may have lost
        self.forgiven: set[int] = set()  # windows of whose report nobody knows any more
        self.versions: dict[tuple[int, int], list[frozenset[int]]] = defaultdict(list)  # what CLOSE counted, by part
        self.sums: dict[int, list[dict[int, int]]] = defaultdict(list)  # what REPORT added up
        self.reports: dict[int, int] = {}

    def ran(self, node: Node, words: Words, reply: Any) -> None:
        """Take note of what a script did."""
        name = self.scripts[words[1]]
        keys = [word.decode() for word in words[3 : 3 + int(words[2])]]
        if name == "CLOSE":
            (members, _) = self.client.run(node.number, ("SMEMBERS", "counted"), ("DEL", "counted"))
            if isinstance(reply, int) and reply >= 0:
                start, part = int(keys[2].rpartition(":")[2]), int(self.nodes.unit_of(words[5])[1:])
                versions = self.versions[start, part]
                if len(members) == reply and frozenset(map(int, members)) not in versions:
                    versions.append(frozenset(map(int, members)))
                assert any(len(version) == reply for version in versions), "a count of nothing"
        elif name == "REPORT":
            (told, _) = self.client.run(node.number, ("HGETALL", "told"), ("DEL", "told"))
            if told:
                start = int(keys[10].rpartition(":")[2])
                counts = {int(part): int(count) for part, count in zip(told[::2], told[1::2], strict=True)}
                if counts not in self.sums[start]:
                    self.sums[start].append(counts)

    def tell(self, instance: Teller, start: int, count: int) -> None:
        """Note that an instance tells the count of a window."""
        heard = instance.heard
        if heard and start <= heard[-1][0]:
            self.errors.append(f"instance {instance.number} tells {start - EPOCH} after {heard[-1][0] - EPOCH}")
        heard.append((start, count))
        if start not in self.forgiven and self.reports.setdefault(start, count) != count:
            self.errors.append(f"{start - EPOCH} was {self.reports[start]}, and is told as {count}")

    def stream(self) -> dict[int, int]:
        """Return the reports in the stream."""
        (entries,) = self.client.run(self.nodes.home.number, ("XRANGE", self.nodes.keys.stream, "-", "+"))
        found: dict[int, int] = {}
        for entry, fields in entries:
            start = int(entry.partition(b"000-0")[0])
            assert start % LENGTH == 0
            assert not found or start > max(found)
            found[start] = int(fields[5])
        return found

    def check(self) -> None:
        """See that what is reported is right, and does not change."""
        assert not self.errors, self.errors
        for start, count in self.stream().items():
            if start in self.forgiven:
                continue
            assert self.reports.setdefault(start, count) == count, f"the count of {start - EPOCH} has changed"
            sums = [sum(counts.values()) for counts in self.sums[start]]
            assert count in sums, f"{count} of {start - EPOCH} is none of {sums}"

    def read(self, node: Node) -> dict[str, Any]:
        """Return the sets and strings of a node."""
        (found,) = self.client.run(node.number, ("EVAL", READ, "0"))
        return {key.decode(): {*map(int, value)} if isinstance(value, list) else value for key, value in found}

    def where(self) -> dict[int, set[int]]:
        """Return the windows that each id is in, counted or waiting to be."""
        found: dict[int, set[int]] = defaultdict(set)
        for part, keys in enumerate(self.nodes.parts):
            for key, value in self.read(self.nodes.of_part(part)).items():
                if key.startswith(keys.ids(0)[:-1]) and isinstance(value, set):
                    for number in value:
                        found[number].add(int(key.rpartition(":")[2]))
        for (start, part), versions in self.versions.items():
            sums = self.sums.get(start, [])
            for version in versions:
                # What is closed and not yet reported is counted, if its count is still known.
                if not sums or any(counts.get(part) == len(version) for counts in sums):
                    for number in version:
                        found[number].add(start)
        return found

    def excuse(self, instances: Iterable[Teller]) -> None:
        """Excuse ids that nobody alive has acknowledged and that may have been lost, and reports likewise."""
        self.excused |= self.orphans - self.kept(instances)

    def kept(self, instances: Iterable[Teller]) -> set[int]:
        """Return the ids that are in Redis where they will be counted, or were; forgive reports that nobody knows."""
        home = self.nodes.home
        (index, ahead) = self.client.run(
            home.number,
            ("ZRANGE", self.nodes.keys._home[0], "0", "-1", "WITHSCORES"),
            ("ZRANGE", self.nodes.keys.closing[0], "0", "-1", "WITHSCORES"),
        )
        known = {*map(int, index[1::2]), *map(int, ahead[1::2])}
        kept: set[int] = set()
        at_home = self.read_counts(home, known)
        for part, keys in enumerate(self.nodes.parts):
            data = self.read(self.nodes.of_part(part))
            for start in known:
                value = data.get(keys.ids(start))
                if isinstance(value, set):
                    kept |= value
                count = at_home.get((start, part))
                if count is None and isinstance(value, bytes):
                    count = int(value.split()[1])
                for version in self.versions[start, part]:
                    if len(version) == count:
                        kept |= version
        stream = self.stream()
        alive = set[int]().union(*(instance.known for instance in instances))
        (returned,) = self.client.run(home.number, ("ZRANGE", self.nodes.keys._home[7], "0", "-1", "WITHSCORES"))
        alive |= {*map(int, returned[1::2])}
        self.forgiven |= {start for start in self.reports if start not in stream and start not in alive}
        for start in self.reports.keys() - self.forgiven:
            for part in range(PARTS):
                for version in self.versions[start, part]:
                    if any(counts.get(part) == len(version) for counts in self.sums[start]):
                        kept |= version
        return kept

    def read_counts(self, home: Node, windows: set[int]) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        for start in windows:
            (counts,) = self.client.run(home.number, ("HGETALL", self.nodes.keys.counts(start)))
            found |= {(start, int(part)): int(n) for part, n in zip(counts[::2], counts[1::2], strict=True)}
        return found

    def check_end(self, instances: Sequence[Teller], last: int) -> None:
        """See that all is counted, once; `last` is a window that is open, older ones should be reported."""
        stream = self.stream()
        acked = set[int]().union(*(instance.acked for instance in instances)) | self.orphans
        where = self.where()
        lost = {number for number in acked - self.excused if not where[number] & stream.keys()}
        lost -= {number for number in lost if max(where[number], default=0) >= last}
        assert not lost, f"acknowledged and not counted: {lost}, seen in {[where[number] for number in lost]}"
        for number, found in where.items():
            windows = found - self.forgiven
            assert len(windows) < 2, f"{number} is counted in {windows}"
            assert number not in self.refused or not windows, f"{number} was refused, and is counted"
        for instance in instances:
            lived = instance.lived_through(last)
            missing = lived - stream.keys()
            assert not missing, f"instance {instance.number} lived through {missing}, which nobody reported"
            told = {start for start, _ in instance.heard}
            assert lived <= told, f"instance {instance.number} did not tell {lived - told}"
