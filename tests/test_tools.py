"""The tools of the tests: mutants that fit the tree, ports that nobody else has, marks that are true."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import marks
import mutants
import pytest
import servers
import soak
import support


@pytest.mark.parametrize("path", sorted(mutants.LISTS.glob("*.py")), ids=lambda path: path.stem)
def test_the_mutants_fit_the_tree(path: Path) -> None:
    """What they change is there once, and so are the tests that must notice."""
    wrong = {number: text for number, each in enumerate(mutants.read(path), 1) if (text := mutants.what_is_wrong(each))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"file": "nowhere.py"}, "nowhere.py is not there"),
        ({"old": "no such text"}, "stands 0 times"),
        ({"old": "def "}, "expected once"),
        ({"new": "def load("}, "the new text is the old one"),
        ({"tests": "tests/test_settings.py"}, "expected a tuple or list"),
        ({"tests": ["tests/test_nothing.py"]}, "tests/test_nothing.py is not there"),
        ({"tests": ["tests/test_settings.py::test_nothing[x]"]}, "test_nothing[x] is not there"),
        ({"tests": ["tests/test_settings.py::test_defaults"]}, ""),
    ],
    ids=str,
)
def test_a_mutant_that_does_not_fit_the_tree_is_told_of(changed: dict[str, Any], expected: str) -> None:
    mutant = mutants.Mutant("settings.py", "def load(", "def loads(", ["tests/test_settings.py"], "as in this test")
    wrong = mutants.what_is_wrong(mutant._replace(**changed))
    assert expected in wrong
    assert bool(wrong) is bool(expected)


def test_ports_are_not_those_of_another_process() -> None:
    ours = {servers.free_port() for _ in range(150)}
    assert len(ours) == servers.BLOCKS.step - 1, "all but the one that keeps the block"
    code = "import servers; print(*(servers.free_port() for _ in range(150)))"
    path = str(Path(servers.__file__).parent)
    told = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True, check=True).stdout
    theirs = {int(word) for word in told.split()}
    assert len(theirs) == len(ours)
    assert not ours & theirs


def test_a_port_where_somebody_listens_is_passed_over() -> None:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        assert server.port not in {servers.free_port() for _ in range(150)}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (support.verve, {"program"}),
        (soak.run, {"program", "redis"}),
        (servers.Proxy, set()),
        (servers.free_port, set()),
    ],
)
def test_what_starts_a_server_or_a_program_is_found(what: Any, expected: set[str]) -> None:
    assert marks.started_by(marks.unwrapped(what)) == expected


def test_the_marks_are_those_of_what_a_test_uses(request: pytest.FixtureRequest) -> None:
    assert {mark.name for mark in request.node.iter_markers()} == {"unit"}


@pytest.mark.usefixtures("server")
def test_a_fixture_counts_as_what_a_test_uses(request: pytest.FixtureRequest) -> None:
    assert "redis" in {mark.name for mark in request.node.iter_markers()}
