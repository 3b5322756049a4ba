"""Finds what a test starts, so that a part of the suite can be chosen: `python -m pytest -m unit`.

`redis` starts a real Redis or Valkey, `program` starts the real program or another one, `unit` does neither. What a
test uses is found in its code: the names in it and in its fixtures, and from there on in the functions and classes of
this folder. So nobody has to keep marks up to date. (`soak` is set by hand: it says how long a test takes.)
"""

import functools
import inspect
import subprocess
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import servers

HERE = Path(__file__).resolve().parent
STARTS: dict[Any, str] = {servers.Redis: "redis", subprocess.Popen: "program", subprocess.run: "program"}


def marks_of(item: pytest.Function, fixtures: Mapping[str, Any]) -> set[str]:
    """Return the marks of a test; `fixtures` are those that its module has from elsewhere."""
    known = {**fixtures, **vars(item.module)}
    roots = [item.function, *(known[name] for name in item.fixturenames if name in known)]
    return {mark for root in roots for mark in started_by(unwrapped(root))} or {"unit"}


def unwrapped(found: Any) -> Any:
    """Return a function without what decorators put around it."""
    test = getattr(found, "hypothesis", None)
    return inspect.unwrap(test.inner_test if test else found)


@functools.cache
def started_by(root: Any) -> frozenset[str]:
    """Return the marks of all that a function or class leads to."""
    marks, seen, ahead = set(), {root}, [root]
    while ahead:
        for found in next_of(ahead.pop()):
            if found in STARTS:
                marks.add(STARTS[found])
            elif found not in seen:
                seen.add(found)
                ahead.append(found)
    return frozenset(marks)


@functools.cache
def next_of(thing: Any) -> tuple[Any, ...]:
    return tuple(leads_to(thing))


def leads_to(thing: Any) -> Iterator[Any]:
    """Yield what is named in the code of a function or class of this folder, and might be called."""
    if isinstance(thing, type):
        members = (getattr(each, "fget", None) or getattr(each, "__func__", each) for each in vars(thing).values())
        for member in map(unwrapped, [*members, *thing.__bases__]):
            if isinstance(member, types.FunctionType | type) and is_ours(member):
                yield member
        return
    if not isinstance(thing, types.FunctionType):
        return
    names = set(names_in(thing.__code__))
    there = thing.__globals__
    for found in [there[name] for name in names if name in there]:
        if not isinstance(found, types.ModuleType):
            inside = [found]
        elif found is subprocess or is_ours(found):
            inside = [vars(found)[name] for name in names if name in vars(found)]
        else:
            inside = []
        for each in map(unwrapped, filter(callable, inside)):
            if isinstance(each, types.FunctionType | type) and (is_ours(each) or each in STARTS):
                yield each


def names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def is_ours(thing: Any) -> bool:
    """Whether it is of this folder: a module, or what is defined in one."""
    module = thing if isinstance(thing, types.ModuleType) else inspect.getmodule(thing)
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).parent == HERE
