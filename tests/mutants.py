"""How the tests are tested: mutants, small changes of the product that the named tests must notice.

    python tests/mutants.py                         # all of them
    python tests/mutants.py --only http1 store:3    # a list; one mutant of a list, by its number

Each module of the folder tests/mutants/ has a list MUTANTS of `Mutant`s, or of plain tuples in the same order. For each
of them the tree is copied to a temporary folder, one text is replaced by another, and the tests that must notice it are
run there until one fails. Then the mutant is dead. At the end this prints:

- those that live: the tests passed with them, and nothing beside them says why they may;
- those in error: the old text is not there exactly once, a named test is not there, or the tests can't even start;
- those that died although a reason says that they live.

The exit status is 0 if there are none of these. Before all this, the named tests must pass without a mutant. A test
that hangs for LIMIT seconds has noticed, too. The normal run has no part in this but for tests/test_tools.py, which
checks that the lists are up to date.
"""

import argparse
import ast
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "tests" / "mutants"
LIMIT = 300.0  # seconds for the tests of one mutant; far beyond what they need on a busy machine
GRACE = 10.0  # seconds that a run which is too long has for its clean-up


class Mutant(NamedTuple):
    """One change of one file, and the tests that must fail with it."""

    file: str  # from the top of the tree
    old: str  # stands exactly once in the file
    new: str
    tests: Sequence[str]  # files or node ids, from the top of the tree
    why: str  # what a user would see
    lives: str = ""  # why no test can notice it, if none can


class Verdict(NamedTuple):
    """What became of a mutant: "dead", "lives" or "error"."""

    name: str
    mutant: Mutant
    word: str
    seconds: float
    text: str = ""


def read(path: Path) -> list[Mutant]:
    """Return the list of a module; one that has none, or wrong entries, raises."""
    spec = importlib.util.spec_from_file_location(f"mutants_of_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [Mutant(*entry) for entry in module.MUTANTS]


def all_mutants() -> dict[str, Mutant]:
    """Return the mutants of all lists by their names: list, colon, number from 1."""
    return {
        f"{path.stem}:{number}": mutant
        for path in sorted(LISTS.glob("*.py"))
        for number, mutant in enumerate(read(path), 1)
    }


def what_is_wrong(mutant: Mutant, root: Path = ROOT) -> str:
    """Say what in a mutant no longer fits the tree, or nothing."""
    file = root / mutant.file
    if not file.is_file():
        return f"{mutant.file} is not there"
    times = file.read_text(encoding="utf-8").count(mutant.old)
    if times != 1:
        return f"the old text stands {times} times in {mutant.file}, expected once: {mutant.old!r}"
    if mutant.old == mutant.new:
        return "the new text is the old one"
    if isinstance(mutant.tests, str) or not mutant.tests:
        return "expected a tuple or list of tests"
    for test in mutant.tests:
        path, *names = test.partition("[")[0].split("::")
        if not (root / path).is_file():
            return f"{path} is not there"
        if names and names[0] not in defined(root / path):
            return f"{test} is not there"
    return ""


def defined(path: Path) -> set[str]:
    """Return the names that a module defines at its top."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def files_of_the_tree() -> list[str]:
    """Return the files that git knows or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@contextlib.contextmanager
def copy_of_the_tree(files: Sequence[str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="verve-mutant-") as folder:
        for name in files:
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        yield Path(folder)


def run_tests(folder: Path, tests: Sequence[str], *options: str, limit: float | None = None) -> tuple[int | None, str]:
    """Run tests in a copy of the tree; return pytest's exit status, or None if it took too long, and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what the tests have started can be ended with them
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE)
        return None, f"no end after {limit} s"
    else:
        return process.returncode, said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def judge(name: str, mutant: Mutant, files: Sequence[str]) -> Verdict:
    """Put a mutant into a copy of the tree, and run there what must notice it."""
    wrong = what_is_wrong(mutant)
    if wrong:
        return Verdict(name, mutant, "error", 0.0, wrong)
    start = time.monotonic()
    with copy_of_the_tree(files) as folder:
        file = folder / mutant.file
        file.write_text(file.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        status, said = run_tests(folder, mutant.tests, "-x", limit=LIMIT)
    seconds = time.monotonic() - start
    if status == 0:
        return Verdict(name, mutant, "lives", seconds)
    if status in {1, None}:
        return Verdict(name, mutant, "dead", seconds, "" if status else said)
    return Verdict(name, mutant, "error", seconds, f"pytest ended with status {status}:\n{said[-2000:]}")


def chosen(mutants: dict[str, Mutant], only: Sequence[str]) -> dict[str, Mutant]:
    """Return those that are asked for: names of lists, or of single mutants."""
    lists = {name.partition(":")[0] for name in mutants}
    unknown = [name for name in only if name not in mutants and name not in lists]
    if unknown:
        sys.exit(f"no such list or mutant: {', '.join(unknown)}; lists are {', '.join(sorted(lists))}")
    return {name: each for name, each in mutants.items() if not only or {name, name.partition(":")[0]} & set(only)}


def tests_pass(mutants: dict[str, Mutant], files: Sequence[str], jobs: int) -> bool:
    """Run the named tests without any mutant."""
    good = [mutant for mutant in mutants.values() if not what_is_wrong(mutant)]
    tests = sorted({test for mutant in good for test in mutant.tests})
    whole = {test for test in tests if "::" not in test}
    tests = [test for test in tests if test in whole or test.partition("::")[0] not in whole]
    if not tests:
        return True
    print(f"first, without a mutant: {len(tests)} tests or files of tests", flush=True)
    with copy_of_the_tree(files) as folder:
        status, said = run_tests(folder, tests, "-n", str(jobs), "--dist", "worksteal")
    if status != 0:
        print(said)
        print("the tests do not pass without a mutant")
    return status == 0


def tell(verdicts: Sequence[Verdict]) -> int:
    """Print what is not as it should be; return the exit status."""
    bad = 0
    for verdict in verdicts:
        name, mutant, word, _, text = verdict
        if word == "error":
            title = "in error"
        elif word == "lives" and not mutant.lives:
            title = "LIVES"
        elif word == "dead" and mutant.lives:
            title, text = "dead, though said to live", mutant.lives
        else:
            continue
        bad += 1
        print(f"\n{name} {title}: {mutant.file}: {mutant.why}")
        if text:
            print(f"  {text}")
        else:
            print(f"  - {mutant.old!r}\n  + {mutant.new!r}\n  not noticed by {' '.join(mutant.tests)}")
    words = [verdict.word for verdict in verdicts]
    excused = sum(verdict.word == "lives" and bool(verdict.mutant.lives) for verdict in verdicts)
    print(
        f"\n{len(words)} mutants: {words.count('dead')} dead, {words.count('lives')} live "
        f"({excused} of them with a reason), {words.count('error')} in error"
    )
    return 1 if bad else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Put mutants into the product and see which the tests notice.")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="lists, or mutants as LIST:NUMBER")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many at a time (default: 2)")
    arguments = parser.parse_args()
    mutants = chosen(all_mutants(), arguments.only)
    files = files_of_the_tree()
    if not tests_pass(mutants, files, arguments.jobs):
        return 2
    verdicts = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for verdict in pool.map(lambda name: judge(name, mutants[name], files), mutants):
            hung = f", {verdict.text}" if verdict.word == "dead" and verdict.text else ""
            print(f"{verdict.name} {verdict.word} ({verdict.seconds:.1f} s{hung}): {verdict.mutant.why}", flush=True)
            verdicts.append(verdict)
    return tell(verdicts)


if __name__ == "__main__":
    sys.exit(main())
