"""The shape of the house: which module may know which, and what every one of them owes its reader."""

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from datetime import date

import pytest
from support import ROOT

import settings

EVERYTHING = {"dedup", "reporter", "http1", "outbound", "admin", "settings", "workers", "redis_store"}
MAY_IMPORT: dict[str, set[str]] = {
    "verve_server": EVERYTHING,
    "dedup": set(),
    "reporter": {"outbound"},
    "http1": set(),
    "outbound": set(),
    "admin": set(),
    "settings": set(),
    "workers": set(),
}
FROM_OTHERS = {"uvloop", "httptools", "redis"}

FLAGS = {
    "host",
    "port",
    "workers",
    "redis-url",
    "key-prefix",
    "window",
    "report-url",
    "report-secret",
    "callback-method",
    "callback-allow",
    "log-file",
    "log-format",
    "log-level",
    "admin",
    "request-timeout",
    "idle-timeout",
    "header-timeout",
    "max-ids",
    "max-connections",
    "worker-timeout",
    "drain-delay",
    "drain-timeout",
}

MODULES = sorted(path.stem for path in ROOT.glob("*.py"))


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Top-level names of what a module imports, wherever in it."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield (node.module or "").partition(".")[0]


def test_there_is_no_room_but_those_of_the_table() -> None:
    assert set(MODULES) <= set(MAY_IMPORT)
    assert {"verve_server", "dedup", "reporter", "http1", "settings"} <= set(MODULES)
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_the_table_allows(module: str) -> None:
    names = set(imports(module))
    ours = {name for name in names if name in MAY_IMPORT or (ROOT / name).is_dir()}
    assert ours <= MAY_IMPORT[module]
    assert names - ours - sys.stdlib_module_names <= FROM_OTHERS
    assert not names & {"importlib", "runpy", "pkgutil"}
    calls = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
    assert not calls & {"__import__", "exec", "eval"}


def test_only_the_settings_read_the_environment() -> None:
    for module in MODULES:
        names = {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
        assert module == "settings" or not names & {"environ", "environb", "getenv", "putenv"}, module


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_its_theory(module: str) -> None:
    text = ast.get_docstring(tree(module))
    assert text is not None
    assert len(text.splitlines()) >= 5


def test_the_flags_are_those_of_the_contract() -> None:
    fields = dataclasses.fields(settings.Settings)
    assert {field.name.replace("_", "-") for field in fields} == FLAGS
    assert all(callable(field.metadata["read"]) for field in fields)


def test_three_packages_at_run_time_and_each_of_them_pinned() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    lines = [line for line in lines if line and not line.startswith("#")]
    pins = [re.fullmatch(r"([a-z]+)==[0-9]+(?:\.[0-9]+)+", line) for line in lines]
    assert None not in pins
    assert sorted(pin[1] for pin in pins if pin) == sorted(FROM_OTHERS)


def test_the_changelog_begins_with_the_version_that_the_program_tells() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    match = re.fullmatch(r"([0-9]+\.[0-9]+\.[0-9]+) - ([0-9-]+)", headings[0])
    assert match, headings[0]
    assert match[1] == settings.VERSION
    date.fromisoformat(match[2])
