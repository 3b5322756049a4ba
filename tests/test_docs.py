"""What the documents say and show: the examples are run as they stand there, and what they refer to is there.

An example is a fenced block of a document. Only the port of Redis is put in, since the tests have their own.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import clusters
import pytest
import receivers
import servers
import support
from operators import served, watched
from processes import wait_until
from support import ROOT

import admin
import verve_server
from redis_store import advice

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SECRET = "whsec_" + "c2l4dGVlbiB0aW1lcyBvciBzbywgbm8gbW9yZSE="

needs_redis_cli = pytest.mark.usefixtures("redis_cli_there")


@pytest.fixture
def redis_cli_there() -> None:
    support.need("redis-cli", "redis-tools")


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


def examples(document: str, language: str) -> list[str]:
    """Return the fenced blocks of a document that are in a language."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def example(document: str, language: str, word: str) -> str:
    """Return the one such block in which a word stands."""
    (found,) = [block for block in examples(document, language) if word in block]
    return found


def shell(text: str, server: servers.Redis, folder: Path) -> str:
    """Run an example in a shell where redis-cli is for a server; return what it prints."""
    redis_cli = folder / "redis-cli"
    redis_cli.write_text(f'#!/bin/sh\nexec {shutil.which("redis-cli")} -e -p {server.port} "$@"\n')
    redis_cli.chmod(0o755)
    result = subprocess.run(
        ["sh", "-e", "-c", f"PATH={folder}:$PATH\n{text}"],
        capture_output=True,
        text=True,
        timeout=support.DEADLINE,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def namespace(text: str, server: servers.Redis | None = None) -> dict[str, Any]:
    """Run an example in Python; return what it defines."""
    if server is not None:
        assert text.count("redis.Redis(") == 1
        text = text.replace("redis.Redis(", f"redis.Redis(port={server.port}, ")
    defined: dict[str, Any] = {}
    exec(compile(text, "example", "exec"), defined)
    return defined


def count(program: support.Program, *numbers: int) -> None:
    with support.Client(program.address) as client:
        for number in numbers:
            assert client.ask(support.accept(number)).status == 200
    program.log.wait_for(r"unique ids in \S+: [1-9]")


@needs_redis_cli
def test_the_examples_with_redis_cli(server: servers.Redis, tmp_path: Path) -> None:
    with (
        receivers.Receiver() as receiver,
        support.verve("--redis-url", server.url, "--window", "1", "--report-url", receiver.url) as program,
    ):
        count(program, 1, 2, 3)
        receiver.wait_for(3)
        printed = [shell(text, server, tmp_path) for text in examples("docs/reading-counts.md", "sh")]
        newest, hour, following, groups = printed
        assert len(re.findall(r"^window$", newest, re.MULTILINE)) == 3
        windows = re.findall(r"^window\n(\S+)\nseconds\n1\ncount\n([0-9]+)$", hour, re.MULTILINE)
        assert sum(int(number) for _, number in windows) == 3
        assert dict(windows).items() <= {name: str(number) for name, number in server.reports().items()}.items()
        (window,) = re.findall(r"^window\n(\S+)$", following, re.MULTILINE)
        assert window > windows[-1][0]
        assert re.search(r"^name\nwebhook\n", groups, re.MULTILINE)
        assert re.search(r"^pending\n[01]$", groups, re.MULTILINE)


def test_the_example_with_a_group(server: servers.Redis) -> None:
    class EnoughError(Exception):
        pass

    taken: list[tuple[str, str, int]] = []

    def handle(*report: Any) -> None:
        taken.append(report)
        if len(taken) in stops:
            raise EnoughError

    def consume(*, until: int) -> None:
        stops[:] = [until]
        with pytest.raises(EnoughError):
            defined["consume"]()

    stops: list[int] = []
    defined = namespace(example("docs/reading-counts.md", "python", "xreadgroup"), server)
    defined["handle"] = handle
    with support.verve("--redis-url", server.url, "--window", "1") as program:
        count(program, 1, 2, 3)
        consume(until=2)
        consume(until=5)
        assert taken[2] == taken[1], "what was not acknowledged comes again"
        del taken[1]
        assert [(window, number) for _, window, number in taken] == list(server.reports().items())[:4]
        assert sum(number for _, _, number in taken) == 3
        with server.client() as client:
            client.delete("verve:reports")
        consume(until=6)
        assert taken[-1][1] > taken[-2][1]


def test_the_example_that_checks_a_signature() -> None:
    defined = namespace(example("docs/reading-counts.md", "python", "hmac"))
    is_genuine = defined["is_genuine"]
    flags = ("--window", "1", "--report-secret", SECRET)
    with receivers.Receiver() as receiver, support.verve(*flags, "--report-url", receiver.url):
        request = receiver.wait_for(1)[0]
    assert is_genuine(SECRET, request.fields, request.body) is True
    assert is_genuine(SECRET.removeprefix("whsec_"), request.fields, request.body) is True
    assert is_genuine(SECRET, request.fields, request.body + b" ") is False
    assert is_genuine("whsec_" + "A" * 32, request.fields, request.body) is False
    assert is_genuine(SECRET, request.fields | {"webhook-id": "verve/another"}, request.body) is False
    sent = int(request.fields["webhook-timestamp"])
    for error, expected in ((299, True), (301, False), (-299, True), (-301, False)):
        defined["time"] = SimpleNamespace(time=lambda now=sent + error: now)
        assert is_genuine(SECRET, request.fields, request.body) is expected
    several = request.fields | {"webhook-signature": "v1,AAAA " + request.fields["webhook-signature"]}
    defined["time"] = SimpleNamespace(time=lambda: sent)
    assert is_genuine(SECRET, several, request.body) is True


@needs_redis_cli
@pytest.mark.parametrize("engine", servers.ENGINES)
def test_a_redis_user_needs_no_more_than_it_says(engine: str, tmp_path: Path) -> None:
    with servers.Redis(engine) as server, receivers.Receiver() as receiver:
        assert shell(example("docs/operations.md", "sh", "ACL SETUSER"), server, tmp_path) == "OK\n"
        url = f"redis://verve:a-password@127.0.0.1:{server.port}/1"
        flags = ("--redis-url", url, "--window", "1", "--report-url", receiver.url, "--callback-allow", "127.0.0.0/8")
        with watched(*flags) as (program, operators):
            with support.Client(program.address) as client:
                endpoint = f"&endpoint={receiver.url}/seen"
                assert client.ask(support.get(f"{support.PATH}?id=1{endpoint}")).status == 200
            count(program, 2)
            receiver.wait_until(lambda requests: {"GET", "POST"} <= {each.method for each in requests}, "both")
            receiver.wait_until(lambda requests: len(requests) >= 3, "a second report")
            wait_until(lambda: any(window["delivered"] for window in operators.windows()))
        assert not any("NOPERM" in line or " WARNING " in line or " ERROR " in line for line in program.log.all)


@needs_redis_cli
@pytest.mark.parametrize("engine", servers.ENGINES)
def test_a_user_of_a_cluster_needs_no_more_than_it_says(engine: str, tmp_path: Path) -> None:
    """Not even when home fails over, and a part moves: each node has a list of what it has denied."""
    with clusters.Cluster(engine) as cluster, receivers.Receiver() as receiver:
        for node in cluster.nodes:
            assert shell(example("docs/operations.md", "sh", "ACL SETUSER"), node, tmp_path) == "OK\n"
        url = cluster.url.replace("redis://", "redis://verve:a-password@")
        flags = ("--redis-url", url, "--window", "1", "--report-url", receiver.url, "--callback-allow", "127.0.0.0/8")
        with watched(*flags) as (program, operators), support.Client(program.address) as client:
            assert client.ask(support.get(f"{support.PATH}?id=1&endpoint={receiver.url}/seen")).status == 200
            count(program, *range(2, 200))
            receiver.wait_until(lambda requests: {"GET", "POST"} <= {each.method for each in requests}, "both")
            home = cluster.primary_of("verve:reports")
            (replica,) = cluster.replicas_of(home)
            cluster.fail_over(replica)
            cluster.settle()
            wait_until(lambda: operators.ready()[0] == 200 and served(operators))
            moved = clusters.slot_of("verve:reports")
            cluster.move([moved], replica, next(node for node in cluster.primaries() if node is not replica))
            for number in range(200, 400):
                wait_until(lambda number=number: client.ask(support.accept(number)).status == 200)  # type: ignore[misc]
            told = len(receiver.requests)
            receiver.wait_until(lambda requests: len(requests) > told + 1, "more reports")
        assert not any("NOPERM" in line for line in program.log.all)
        assert [node.tell("ACL", "LOG") for node in cluster.nodes] == [[]] * len(cluster.nodes)


def test_all_commands_of_redis_are_in_the_example_of_a_user(server: servers.Redis) -> None:
    with server.client() as client:
        there = set(client.command())
    used = set()
    for file in (ROOT / "redis_store").iterdir():
        if file.suffix == ".lua":
            used |= set(re.findall(r"redis\.p?call\('(\w+)'", file.read_text(encoding="utf-8")))
        elif file.suffix == ".py":  # commands are tuples that begin with a name in capitals
            used |= set(re.findall(r"\(\"([A-Z]+)\"[,)]", file.read_text(encoding="utf-8")))
    used = {name.lower() for name in used} & there - {"auth", "readonly"}  # anybody may; an error's name
    assert {"time", "xreadgroup", "scard", "client"} <= used
    allowed = re.findall(r"\+(\w+)", example("docs/operations.md", "sh", "ACL SETUSER"))
    assert used == set(allowed)


def test_two_instances_without_docker_as_pasted(tmp_path: Path) -> None:
    """Nothing is left behind: not in the tree, not among temporary files, and no process."""
    for tool, package in (("nginx", "nginx-light"), ("curl", "curl")):
        support.need(tool, package)
    tree, tools, temporary = tmp_path / "tree", tmp_path / "tools", tmp_path / "t"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    temporary.mkdir()
    tools.mkdir()
    (tools / "redis-server").symlink_to(next(iter(servers.ENGINES.values())))
    ours, one, other, at_one, at_other, redis = (servers.free_port() for _ in range(6))
    conf = tree / "deploy" / "nginx.conf"
    conf.write_text(conf.read_text().replace("listen 8080;", f"listen 127.0.0.1:{ours};"))
    python = f"mkdir -p $there/venv/bin && ln -s {tools}/python $there/venv/bin"
    (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python").chmod(0o755)
    start, end = [text for text in examples("docs/operations.md", "sh") if "809$n" in text or "kill %" in text]
    for old, new in {
        "python3 -m venv .*": python,
        r"809\$n": f"$(({2 * one - other} + {other - one} * n))",
        r"909\$n": f"$(({2 * at_one - at_other} + {at_other - at_one} * n))",
        "127.0.0.1:8080": f"127.0.0.1:{ours}",
        "127.0.0.1:8091": f"127.0.0.1:{one}",
        "127.0.0.1:8092": f"127.0.0.1:{other}",
        "6390": str(redis),
    }.items():
        assert re.search(old, start), old
        start = re.sub(old, lambda _, new=new: new, start)  # type: ignore[misc]
    asking = "curl --silent --fail --retry 30 --retry-delay 1 --retry-connrefused --output /dev/null"
    both_are_up = "".join(f"{asking} 'http://127.0.0.1:{port}/api/verve/accept?id=7'\n" for port in (one, other))
    before = [*tree.rglob("*")]
    pasted = subprocess.run(
        ["bash"],
        input=start + both_are_up + end,
        cwd=tree,
        env={"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=2 * support.DEADLINE,
        check=False,
    )
    assert (pasted.returncode, pasted.stdout) == (0, "ok"), pasted.stderr
    assert pasted.stderr.count("INFO verve: listening on") == 2
    assert [*temporary.iterdir()] == []
    assert [*tree.rglob("*")] == before


def test_what_the_log_says_of_mistakes_is_what_operations_says() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| mistake \|.*\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    said = [row.split(" | ")[1].removesuffix(" |").replace("`", "") for row in table.splitlines()]
    assert len(said) > 20
    assert set(said) <= set(advice.ADVICE.values())


def test_the_readme_has_a_row_for_each_metric() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:verve|process)_[a-z_]+)(?:\{[a-z]+\})?`", text)) == set(admin.METRICS)


def test_each_reason_of_a_failure_has_its_words_wherever_it_is_told() -> None:
    names = "README.md", "docs/guarantees.md", "admin.html"
    readme, guarantees, page = ((ROOT / name).read_text(encoding="utf-8") for name in names)
    with watched() as (_, operators):
        reasons = set(re.findall(r'verve_failures_total{reason="(\w+)"}', "\n".join(operators.numbers())))
    (row,) = re.findall(r"^\| `verve_failures_total{reason}` .*", readme, re.MULTILINE)
    text = admin.METRICS["verve_failures_total"][1]
    (words,) = re.findall(r"const REASONS = {(.*?)}", page, re.DOTALL)
    told = {
        "the README's table of metrics": set(re.findall(r"`(\w+)`", row)),
        "REASONS in admin.html": set(re.findall(r'(\w+): "', words)),
        "the text in admin.METRICS": {reason for reason in reasons if reason in text},
    }
    assert {place: words ^ reasons for place, words in told.items() if words != reasons} == {}
    sentences = set(re.findall("`([^`]+)`", guarantees.partition("of a 503 | is the id stored?")[2]))
    sent = {sentence for _, sentence in verve_server.FAILURES.values()}
    sent |= {"too many callbacks wait", "too many connections are open"}
    assert sentences ^ sent == set(), "the table at the end of docs/guarantees.md"


def test_the_files_that_contributing_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests/|redis_store/|docs/)?[a-z_0-9]+\.(?:py|md|txt|html|lua))`", text)
    folders = [ROOT, ROOT / "tests", ROOT / "docs", ROOT / "redis_store"]
    assert len(named) > 15
    assert [name for name in named if not any((folder / name).is_file() for folder in folders)] == []
    verbs = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", text)) | {"help"} == set(verbs)
    rooms = {path.name for path in ROOT.glob("*.py")}
    assert rooms <= set(named), "each room has its job told"


def test_the_tests_that_the_guarantees_name_are_there() -> None:
    named = re.findall(r"`(test_\w+)(?:\[\S+\])?`", (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8"))
    files = (ROOT / "tests").glob("test_*.py")
    there = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    assert len(named) > 15
    assert set(named) <= there


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        there = (document.parent / file).resolve() if file else document
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, target
