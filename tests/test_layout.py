"""The shape of the house: which module may know which, and what every one of them owes its reader."""

import ast
import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import date
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest
from support import ROOT

import settings

EVERYTHING = {
    *("dedup", "redis_store", "reporter", "outbound", "admin", "settings", "workers"),
    *("http1", "request_reader", "fixed_answers"),
}
MAY_IMPORT: dict[str, set[str]] = {
    "verve_server": EVERYTHING,
    "dedup": set(),
    "reporter": {"outbound"},
    "http1": {"request_reader", "fixed_answers"},
    "request_reader": set(),
    "fixed_answers": set(),
    "outbound": set(),
    "admin": set(),
    "settings": set(),
    "workers": set(),
    "redis_store": {"dedup", *(f"redis_store.{path.stem}" for path in ROOT.glob("redis_store/[!_]*.py"))},
    "redis_store.wire": set(),
    "redis_store.topology": {"redis_store.advice", "redis_store.wire"},
}
FROM_OTHERS = {"uvloop", "httptools", "redis"}

FLAGS = {
    "host",
    "port",
    "workers",
    "redis-url",
    "sentinel-password",
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

PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in ROOT.glob(f"{name}/**/*.py"))]
)


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tree(module: str) -> ast.Module:
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Names of what a module imports, wherever in it: whole ones of our modules, of others the first part."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            assert node.module is not None
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names = [*inside & set(MODULES)] or [node.module]
        else:
            continue
        yield from (name if name in MODULES else name.partition(".")[0] for name in names)


def may_import(module: str) -> set[str]:
    """Return what the table says; a module that has no row there may know what its package may."""
    return MAY_IMPORT[module if module in MAY_IMPORT else module.partition(".")[0]]


def test_there_is_no_room_but_those_of_the_table() -> None:
    assert {module.partition(".")[0] for module in MODULES} <= set(MAY_IMPORT)
    assert {"verve_server", "dedup", "reporter", "http1", "settings"} <= set(MODULES)
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_the_table_allows(module: str) -> None:
    names = set(imports(module))
    ours = {name for name in names if name in MODULES or (ROOT / name).is_dir()}
    assert ours <= may_import(module)
    assert names - ours - sys.stdlib_module_names <= FROM_OTHERS
    assert not names & {"importlib", "runpy", "pkgutil"}
    calls = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
    assert not calls & {"__import__", "exec", "eval"}


def test_no_module_knows_one_that_knows_it() -> None:
    TopologicalSorter({module: set(imports(module)) & set(MODULES) for module in MODULES}).prepare()


def test_only_the_settings_read_the_environment() -> None:
    for module in MODULES:
        names = {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
        assert module == "settings" or not names & {"environ", "environb", "getenv", "putenv"}, module


@pytest.mark.parametrize("module", MODULES)
def test_a_module_opens_with_its_theory(module: str) -> None:
    """A small one may say it in a line."""
    text = ast.get_docstring(tree(module))
    assert text is not None
    lines = len(file_of(module).read_text(encoding="utf-8").splitlines())
    assert len(text.splitlines()) >= 5 or lines <= 100


def test_the_flags_are_those_of_the_contract() -> None:
    fields = dataclasses.fields(settings.Settings)
    assert {field.name.replace("_", "-") for field in fields} == FLAGS
    assert all(callable(field.metadata["read"]) for field in fields)


def test_three_packages_at_run_time_and_each_of_them_pinned_with_its_hashes() -> None:
    """And one that redis needs on the first releases of Python 3.11. Those that run here are the pinned ones."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    text = re.sub("^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    pins = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([a-z-]+)==([0-9.]+)((?: ; .*?)?)((?: +--hash=sha256:[0-9a-f]{64})+) *", line)
        assert match, line
        pins[match[1]] = match[2]
        assert (" ; python_full_version < '3.11.3'" in match[3]) == (match[1] == "async-timeout")
    assert pins.keys() == FROM_OTHERS | {"async-timeout"}
    assert {name: version(name) for name in FROM_OTHERS} == {name: pins[name] for name in FROM_OTHERS}


def test_the_changelog_begins_with_the_version_that_the_program_tells() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    match = re.fullmatch(r"([0-9]+\.[0-9]+\.[0-9]+) - ([0-9-]+)", headings[0])
    assert match, headings[0]
    assert match[1] == settings.VERSION
    date.fromisoformat(match[2])


def sizes(nodes: type[ast.AST] | tuple[type[ast.AST], ...], most: int) -> list[str]:
    """Name the functions or classes of the product that have more lines than allowed."""
    return [
        f"{module}.{node.name}: {lines} lines, expected no more than {most}"
        for module in MODULES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and isinstance(node, nodes)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > most
    ]


def fields_of(node: ast.ClassDef) -> set[str]:
    """Return the names that a class gives its objects: in its slots, or in __init__."""
    found = set()
    for part in node.body:
        if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name) and part.targets[0].id == "__slots__":
            found |= {str(each.value) for each in ast.walk(part.value) if isinstance(each, ast.Constant)}
        elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
            found |= {
                each.attr
                for each in ast.walk(part)
                if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
                if isinstance(each.value, ast.Name) and each.value.id == "self"
            }
    return found


def test_no_function_is_too_long() -> None:
    assert sizes((ast.FunctionDef, ast.AsyncFunctionDef), 60) == []


def test_no_class_is_too_long() -> None:
    assert sizes(ast.ClassDef, 300) == []


def test_no_class_has_too_many_fields_unless_it_says_why() -> None:
    """Its docstring then has the word `fields`."""
    classes = [
        (module, node) for module in MODULES for node in ast.walk(tree(module)) if isinstance(node, ast.ClassDef)
    ]
    assert {
        f"{module}.{node.name}": len(fields)
        for module, node in classes
        if len(fields := fields_of(node)) > 20 and "fields" not in (ast.get_docstring(node) or "")
    } == {}


@pytest.mark.parametrize(("files", "most"), [(map(file_of, MODULES), 650), (ROOT.glob("tests/*.py"), 800)])
def test_no_file_is_too_long(files: Iterable[Path], most: int) -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > most} == {}
