"""What may befall a fleet on a cluster, drawn at random, and made as short as it can be when it shows a failure.

    PYTHONPATH=. python tests/cluster_plays.py --plays 1000 --seed 7 --engine redis

It is all in the hands of cluster_model.py: nothing here waits for anything. Two things are left out, since no count
can survive them: an instance that is kept from arriving again for longer than the fleet's patience, and a FLUSHALL
with ids on their way behind it.
"""

import argparse
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import servers
from cluster_model import Link, World
from cluster_nodes import LENGTH, Node

Step = tuple[str, dict[str, Any]]  # a method of Play, and its arguments

DATABASES = ("--databases", "16")
NOTICED = 1.0  # seconds from one failover of a node to the next: two within one probe are not noticed
DELAY = 0.5  # seconds in which not all may be on its way, while somebody has to arrive again
SHRINKING = 30.0  # seconds


class Play:
    """One play: what is done to a world, step by step. A step that can't be done just then does nothing."""

    def __init__(self, server: servers.Redis) -> None:
        self.world = World(server)
        self.delay = DELAY  # that is left

    def begin(self, replicas: bool, instances: int, into: float) -> None:
        world, nodes = self.world, self.world.nodes
        if replicas:
            nodes.follows = {nodes.all[2]: nodes.all[0], nodes.all[3]: nodes.all[1]}
        for _ in range(instances):
            world.start()
        world.flow(into)

    # The fleet

    def start(self) -> None:
        if len(self.world.instances) < 3:
            self.world.start()

    def crash(self, pick: int) -> None:
        if self.world.instances:
            self.world.crash(self.world.instances[pick % len(self.world.instances)])

    def stop(self, pick: int) -> None:
        if self.world.instances:
            self.let_arrive()
            self.world.stop(self.world.instances[pick % len(self.world.instances)])

    def send(self, pick: int, count: int, at_once: bool) -> None:
        world = self.world
        if not world.instances:
            return
        instance = world.instances[pick % len(world.instances)]
        for number in range(world.next, world.next + count):
            instance.send(number)
        world.next += count
        if at_once:
            world.flow()
        else:
            world.step()

    # What is on its way

    def link(self, pick: int) -> Link | None:
        links = [link for link in self.world.links if link.busy]
        return links[pick % len(links)] if links else None

    def deliver(self, pick: int, how: str) -> None:
        """Let what is on its way on a link arrive: the commands, one of them, the replies."""
        link = self.link(pick)
        if link is None:
            return
        if how != "answers":
            link.execute(1 if how == "one" else 1 << 30)
        if how != "unanswered":
            self.world.loop.call_soon(link.answer)
        self.world.step()

    def cut(self, pick: int, executed: int) -> None:
        """Break a link, after some of the commands that are on their way."""
        link = self.link(pick)
        if link is not None:
            link.execute(executed)
            self.world.cut(link)
            self.world.step()

    def hold(self, pick: int, node: int) -> None:
        """Have the links of an instance fall silent: those to a node, or all (4)."""
        world = self.world
        for link in world.links:
            if link.owner is world.instances[pick % len(world.instances)] and node in (link.node.number, 4):
                link.held = True

    def deliver_late(self, pick: int) -> None:
        world = self.world
        if world.late:
            node, boots, commands = world.late.pop(pick % len(world.late))
            if node.boots == boots and node.up and not node.frozen:
                world.late_arrives(node, commands)
            world.step()

    # Time

    def flow(self) -> None:
        self.world.flow()

    def let_pass(self, seconds: float) -> None:
        self.let_arrive()
        self.world.flow(seconds)

    def reach_edge(self, past: float) -> None:
        self.let_arrive()
        world = self.world
        world.flow((LENGTH - 0.3 - world.loop.now) % LENGTH)
        world.step(0.3 + past)

    def creep(self, seconds: float) -> None:
        """Let time pass with nothing arriving."""
        if not self.world.unsettled():
            self.delay = DELAY
        elif seconds > self.delay:
            return
        self.delay -= seconds
        self.world.step(seconds)

    def let_arrive(self) -> None:
        """Have nothing that would keep an instance from arriving for longer than the fleet's patience."""
        world = self.world
        for node in world.nodes.all:
            if node.stale:
                world.nodes.heal(node)
        if world.unsettled():
            for link in world.links:
                if link.born >= link.node.lost:
                    link.held = False
            for node in world.nodes.all:
                if world.loop.now - node.lost < 10:
                    node.frozen = False
        self.delay = DELAY

    # The cluster

    def primary(self, pick: int) -> Node:
        owners = sorted(set(self.world.nodes.owners.values()), key=lambda node: node.number)
        return owners[pick % len(owners)]

    def lose(self, pick: int, how: str) -> None:
        """Have a node go on with what it, or its replica, had at an earlier moment, or with nothing."""
        world, node = self.world, self.primary(pick)
        replica = node.replica
        if how in ("failover", "takeover") and replica is not None:
            if world.loop.now > node.lost + NOTICED:
                if how == "failover" and node.up:
                    world.kill(node)
                world.nodes.promote(replica, stale=True)
        elif how == "flush" and node.up and not node.frozen:
            if not any(link.unsent for link in world.links if link.node is node):
                world.nodes.flush(node)
        elif node.up:
            world.kill(node)
            world.nodes.restart(node, how)
        world.excuse()
        world.step()

    def go_away(self, pick: int) -> None:
        node = self.primary(pick)
        if node.up:
            self.world.kill(node)
            self.world.step()

    def come_back(self, pick: int, how: str) -> None:
        down = [node for node in self.world.nodes.all if not node.up]
        if down:
            self.world.nodes.restart(down[pick % len(down)], how)
            self.world.excuse()
            self.world.step()

    def freeze(self, pick: int) -> None:
        node = self.primary(pick)
        node.frozen = not node.frozen

    def hinder(self, pick: int, what: str) -> None:
        node = self.primary(pick)
        setattr(node, what, not getattr(node, what))

    def save(self, pick: int) -> None:
        """Have what a node has now be what it, or its replica, will have when it is lost."""
        node = self.primary(pick)
        if node.up and not node.frozen:
            self.world.nodes.copy(node.number, node.saved)
            node.synchronise()

    def fail_over(self, pick: int, graceful: bool) -> None:
        """Have a replica take over from a node that stands; all is there if it is graceful."""
        world, node = self.world, self.primary(pick)
        replica = node.replica
        if replica is None or not node.up or world.loop.now < node.lost + NOTICED:
            return
        if not graceful or node.synchronise():
            world.nodes.promote(replica, stale=False)
            world.excuse()
            world.step()

    def move(self, unit: str, pick: int) -> None:
        """Move a slot to another node."""
        nodes, node = self.world.nodes, self.primary(pick)
        if node is not nodes.owners[unit] and node.up and nodes.owners[unit].up:
            nodes.move(unit, node)
            self.world.step()


def draw_steps(lot: random.Random) -> list[Step]:
    """Draw what is to happen in one play; what is rare leaves most plays alone."""

    def pick() -> int:
        return lot.randrange(6)

    draws: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {  # how often, and with which arguments
        "send": (10, lambda: {"pick": pick(), "count": lot.randint(1, 4), "at_once": lot.random() < 0.7}),
        "deliver": (
            lot.choice([0, 5, 15]),
            lambda: {"pick": lot.randrange(12), "how": lot.choice(["all", "all", "one", "unanswered", "answers"])},
        ),
        "cut": (lot.choice([0, 2]), lambda: {"pick": lot.randrange(12), "executed": lot.choice([0, 1, 2, 3, 99])}),
        "hold": (5, lambda: {"pick": pick(), "node": lot.choice([0, 1, 2, 3, 4, 4, 4])}),
        "deliver_late": (2, lambda: {"pick": pick()}),
        "flow": (5, dict),
        "let_pass": (5, lambda: {"seconds": lot.choice([0.3, 1.2, 4.0])}),
        "reach_edge": (6, lambda: {"past": lot.choice([-0.2, -0.01, 0.0, 0.03])}),
        "creep": (4, lambda: {"seconds": lot.choice([0.02, 0.06, 0.2, 0.4])}),
        "lose": (
            lot.choice([1, 3]),
            lambda: {
                "pick": pick(),
                "how": lot.choice(["failover", "takeover", "saved", "empty", "flush", "whole"]),
            },
        ),
        "go_away": (lot.choice([0, 0, 1]), lambda: {"pick": pick()}),
        "come_back": (3, lambda: {"pick": pick(), "how": lot.choice(["whole", "saved", "empty"])}),
        "freeze": (lot.choice([0, 0, 1]), lambda: {"pick": pick()}),
        "hinder": (lot.choice([0, 0, 1]), lambda: {"pick": pick(), "what": lot.choice(["lags", "minority"])}),
        "save": (lot.choice([0, 1, 2]), lambda: {"pick": pick()}),
        "fail_over": (lot.choice([0, 1]), lambda: {"pick": pick(), "graceful": lot.random() < 0.5}),
        "move": (lot.choice([0, 0, 1]), lambda: {"unit": lot.choice(["home", "p0", "p1"]), "pick": pick()}),
        "start": (lot.choice([0, 2]), dict),
        "crash": (lot.choice([0, 1]), lambda: {"pick": pick()}),
        "stop": (lot.choice([0, 0, 1]), lambda: {"pick": pick()}),
    }
    names = lot.choices(list(draws), [often for often, _ in draws.values()], k=lot.choice([15, 30, 45]))
    begin = {"replicas": lot.random() < 0.6, "instances": lot.randint(2, 3), "into": lot.choice([0.0, 1.0, 3.5])}
    return [("begin", begin), *((name, draws[name][1]()) for name in names)]


def play(server: servers.Redis, steps: Sequence[Step]) -> AssertionError | None:
    """Do the steps, let everything come back, and see all the while that all holds; return what does not."""
    played = Play(server)
    try:
        for name, arguments in steps:
            getattr(played, name)(**arguments)
        played.world.quiesce()
    except AssertionError as error:
        return error
    finally:
        played.world.close()
    return None


def shrink(server: servers.Redis, steps: list[Step], error: AssertionError) -> tuple[list[Step], AssertionError]:
    """Leave out what a failure does not need, for as long as that helps."""

    def kind(failure: AssertionError | None) -> str:
        return re.sub(r"\d+", "N", str(failure))[:40]

    until = time.monotonic() + SHRINKING
    size = len(steps) // 2
    while size and time.monotonic() < until:
        start, before = 1, len(steps)
        while start < len(steps) and time.monotonic() < until:
            fewer = steps[:start] + steps[start + size :]
            found = play(server, fewer)
            if found and kind(found) == kind(error):
                steps, error = fewer, found
            else:
                start += size
        if size > 1 or len(steps) == before:
            size //= 2
    return steps, error


def check_model(server: servers.Redis, plays: Iterable[int], seed: int) -> None:
    """Do the plays of these numbers; a failure tells the steps that lead to it, which can be played again by hand."""
    for number in plays:
        steps = draw_steps(random.Random(f"{seed} {number}"))
        error = play(server, steps)
        if error:
            steps, error = shrink(server, steps, error)
            error.add_note(f"seed {seed}, play {number}, {server.engine}; this does it, or quiesce() after it:")
            for name, arguments in steps:
                error.add_note(f"play.{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
            raise error


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plays", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=servers.ENGINES, default=next(iter(servers.ENGINES)))
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with servers.Redis(options.engine, *DATABASES) as server:
        check_model(server, range(options.plays), options.seed)


if __name__ == "__main__":
    main()
