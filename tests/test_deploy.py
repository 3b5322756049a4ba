r"""What stands around the program: the image, the two instances behind nginx, and what users are shown of them.

nginx runs with the configuration of the deployment; only ports and addresses are put in, and a field that tells which
instance answered. Dockerfile and compose.yaml can't be carried out without an engine, but much of them can: the words
that start the program, the health check, the command line of Redis.
"""

import contextlib
import http.server
import itertools
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import receivers
import servers
import support
import yaml
from support import ROOT

import settings

DAY = ("--window", "86400")
CONNECTIONS = 8  # of the load
needs_nginx = pytest.mark.usefixtures("nginx_there")


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.Redis(next(iter(servers.ENGINES))) as server:
        yield server


def counted(server: servers.Redis) -> int:
    """Return how many ids are in Redis, in all windows."""
    with server.client() as connected:
        client: Any = connected
        sets: list[int] = [client.scard(key) for key in client.keys("verve:{*}:ids") if client.type(key) == "set"]
        return sum(server.reports().values()) + sum(sets)


def wait_until_open(port: int) -> None:
    """Wait until somebody listens on a port; nobody tells."""
    until = time.monotonic() + support.DEADLINE
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        assert time.monotonic() < until
        time.sleep(0.01)


# nginx


@contextlib.contextmanager
def nginx(folder: Path, *ports: int) -> Iterator[support.Address]:
    """Run nginx before two ports; return its address."""
    address = "127.0.0.1", servers.free_port()
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    temporary = "".join(f"{of}_temp_path {of};" for of in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    for old, new in {
        "listen 8080;": f"listen {address[0]}:{address[1]};",
        "server verve-1:8080 resolve ": f"server 127.0.0.1:{ports[0]} ",
        "server verve-2:8080 resolve ": f"server 127.0.0.1:{ports[1]} ",
        "http {": f"http {{ {temporary} add_header Upstream $upstream_addr always;",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    conf = folder / "nginx.conf"
    conf.write_text(text)
    process = subprocess.Popen(
        ["nginx", "-p", str(folder), "-c", str(conf), "-e", "stderr", "-g", "daemon off; pid nginx.pid;"],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    log = support.Lines(process.stderr)
    try:
        wait_until_open(address[1])
        yield address
    except BaseException as error:
        error.add_note("\n".join(["nginx's stderr:", *log.all[-50:]]))
        raise
    finally:
        process.terminate()
        process.wait(support.DEADLINE)
        log.join()


class Instances:
    """Two instances that are started on the same ports again."""

    def __init__(self, server: servers.Redis) -> None:
        self.server = server
        self.ports = servers.free_port(), servers.free_port()
        self.programs: dict[int, support.Program] = {}
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> "Instances":
        for number in range(2):
            self.start(number)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def start(self, number: int) -> None:
        flags = ("--redis-url", self.server.url, "--port", str(self.ports[number]), *DAY)
        self.programs[number] = self._ends.enter_context(support.verve(*flags))


class Load:
    """Connections that ask for one id after the other, none of them twice, while the block runs."""

    def __init__(self, address: support.Address) -> None:
        self.said: Counter[tuple[int, bytes]] = Counter()
        self.last: Counter[str] = Counter()  # answers of each upstream since `wait_for`
        self._address = address
        self._ids = itertools.count()
        self._over = False
        self._errors: list[BaseException] = []
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run) for _ in range(CONNECTIONS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        for thread in self._threads:
            thread.join(support.DEADLINE)
            assert not thread.is_alive()
        if self._errors:
            raise self._errors[0]

    def _run(self) -> None:
        try:
            with support.Client(self._address) as client:
                while not self._over:
                    answer = client.ask(support.accept(next(self._ids)))
                    with self._changed:
                        self.said[answer.status, answer.body] += 1
                        self.last[answer.fields.get("upstream", "").rpartition(" ")[2]] += 1
                        self._changed.notify_all()
        except BaseException as error:  # raised in the test's own thread
            self._errors.append(error)

    def wait_for(self, *ports: int) -> None:
        """Wait until each of the ports has answered a hundred requests more."""
        with self._changed:
            self.last.clear()
            done = self._changed.wait_for(
                lambda: self._errors or all(self.last[f"127.0.0.1:{port}"] >= 100 for port in ports), support.DEADLINE
            )
            assert done, self.last


@pytest.fixture
def nginx_there() -> None:
    support.need("nginx", "nginx-light")


@needs_nginx
def test_instances_behind_nginx_count_an_id_once(server: servers.Redis, tmp_path: Path) -> None:
    with Instances(server) as instances, nginx(tmp_path, *instances.ports) as address:
        upstreams = set()
        with support.Client(address) as client:
            for number in [*range(100), *range(99, -1, -1)]:
                answer = client.ask(support.accept(number))
                assert (answer.status, answer.body) == (200, b"ok")
                upstreams.add(answer.fields["upstream"])
            assert client.ask(support.get("/api/verve/accept?id=seven")).status == 400
        assert len(upstreams) == 2
        assert counted(server) == 100


@needs_nginx
def test_connections_to_the_instances_are_kept(server: servers.Redis, tmp_path: Path) -> None:
    with receivers.Receiver() as one, receivers.Receiver() as other, nginx(tmp_path, one.port, other.port) as address:
        with support.Client(address) as client:
            for number in range(50):
                assert client.ask(support.accept(number)).status == 200
        assert len(one.requests) + len(other.requests) == 50
        assert one.connections + other.connections <= 4  # nginx may have two workers or more; a connection has one


@needs_nginx
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_of_one_after_the_other_under_load(
    server: servers.Redis, tmp_path: Path, number: signal.Signals
) -> None:
    with Instances(server) as instances, nginx(tmp_path, *instances.ports) as address:
        with Load(address) as load:
            load.wait_for(*instances.ports)
            for one, other in ((0, 1), (1, 0)):
                instances.programs[one].stop(number)
                load.wait_for(instances.ports[other])
                instances.start(one)
                load.wait_for(*instances.ports)
        ok = load.said.pop((200, b"ok"))
        lost = load.said.pop((503, b"failed"), 0)  # asked of an instance that was killed before it answered
        assert not load.said
        assert ok <= counted(server) <= ok + lost
        if number == signal.SIGTERM:
            assert not lost
        else:
            assert lost <= 2 * CONNECTIONS


@needs_nginx
def test_a_request_whose_answer_is_lost_is_not_sent_again(tmp_path: Path) -> None:
    reset = receivers.Answer(receivers.RESET)
    with (
        receivers.Receiver(default=reset) as one,
        receivers.Receiver(default=reset) as other,
        nginx(tmp_path, one.port, other.port) as address,
        support.Client(address) as client,
    ):
        answer = client.ask(support.accept(7))
        assert (answer.status, answer.body) == (503, b"failed")
        assert answer.fields["retry-after"] == "1"
        assert len(one.requests) + len(other.requests) == 1


@needs_nginx
@pytest.mark.parametrize("silent", [False, True], ids=["refuses", "silent"])
def test_a_request_that_was_not_sent_is_tried_on_the_other(tmp_path: Path, *, silent: bool) -> None:
    with contextlib.ExitStack() as stack:
        away = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = away.getsockname()[1]
        if silent:  # a full queue: the kernel drops what comes, like a host that is gone
            waiting = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            assert waiting.getpeername()[1] == port
        else:
            away.close()
        receiver = stack.enter_context(receivers.Receiver())
        address = stack.enter_context(nginx(tmp_path, port, receiver.port))
        client = stack.enter_context(support.Client(address))
        for number in range(10):
            assert client.ask(support.accept(number)).status == 200
        assert len(receiver.requests) == 10


@needs_nginx
def test_nobody_is_there(tmp_path: Path) -> None:
    with nginx(tmp_path, servers.free_port(), servers.free_port()) as address, support.Client(address) as client:
        for number in range(3):
            answer = client.ask(support.accept(number))
            assert (answer.status, answer.body) == (503, b"failed")
            assert answer.fields["verve-error"] == "no instance answered"


# compose.yaml


def compose() -> Any:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_compose_starts_two_instances_of_one_kind_behind_nginx() -> None:
    services = compose()["services"]
    assert services["verve-1"] == services["verve-2"]
    conf = (ROOT / "deploy" / "nginx.conf").read_text()
    upstreams = re.findall(r"^ *server (\S+):([0-9]+) resolve ", conf, re.MULTILINE)
    config = settings.load([], services["verve-1"]["environment"])
    assert upstreams == [("verve-1", str(config.port)), ("verve-2", str(config.port))]
    assert config.redis_url == "redis://redis:6379"
    assert int(services["verve-1"]["stop_grace_period"].removesuffix("s")) > config.drain_timeout
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
    (mount,) = services["nginx"]["volumes"]
    source, target, _ = mount.split(":")
    assert (ROOT / source).is_file()
    assert target == "/etc/nginx/nginx.conf"
    (published,) = services["nginx"]["ports"]
    (listen,) = re.findall(r"^ *listen ([0-9]+);", conf, re.MULTILINE)
    assert published.split(":")[1] == listen
    idle = re.findall(r"keepalive_timeout ([0-9]+)s;", conf)
    assert [int(seconds) < config.idle_timeout for seconds in idle] == [True]


@pytest.mark.parametrize("engine", servers.ENGINES)
def test_the_redis_of_compose_keeps_its_data_and_evicts_nothing(engine: str) -> None:
    service = compose()["services"]["redis"]
    program, *flags = service["command"]
    assert program == "redis-server"
    assert service["volumes"] == ["redis:/data"]
    assert "redis" in compose()["volumes"]
    with servers.Redis(engine, *flags) as server:
        with server.client() as client:
            got: Any = client.config_get("maxmemory*", "appendonly", "save")
            assert got["maxmemory-policy"] == "noeviction"
            assert int(got["maxmemory"]) == 2**30
            client.set("key", "value")
        server.kill(signal.SIGTERM)
        server.start()
        with server.client() as client:
            assert client.get("key") == "value"


# Dockerfile


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile and what follows each."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name.isupper()]


def words(name: str) -> list[str]:
    """Return the words of an instruction in exec form, to be run here."""
    (rest,) = [rest for found, rest in instructions() if found == name]
    command: list[str] = json.loads(rest[rest.index("[") :])
    assert command[0] == "python"
    return [sys.executable, *command[1:]]


@pytest.mark.parametrize("link", [False, True])
def test_the_image_finds_a_linked_redis(server: servers.Redis, *, link: bool) -> None:
    env = support.environment() | dict(rest.split("=") for name, rest in instructions() if name == "ENV")
    if link:
        env |= {
            "REDIS_NAME": "/peaceful_bell/redis",
            "REDIS_PORT": f"tcp://127.0.0.1:{server.port}",
            "REDIS_PORT_6379_TCP": f"tcp://127.0.0.1:{server.port}",
            "REDIS_PORT_6379_TCP_PROTO": "tcp",
            "REDIS_PORT_6379_TCP_ADDR": "127.0.0.1",
            "REDIS_PORT_6379_TCP_PORT": str(server.port),
        }
    process = subprocess.Popen(
        [*words("ENTRYPOINT"), "--port", "0", "--admin", "off"], cwd=ROOT, env=env, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    log = support.Lines(process.stderr)
    try:
        line = log.wait_for(r"listening on http://0\.0\.0\.0:[0-9]+, counting in [^,]+")[0]
        assert line.endswith(f"Redis at 127.0.0.1:{server.port}" if link else "memory")
    finally:
        process.terminate()
        assert process.wait(support.DEADLINE) == 0
        log.join()


def test_the_image_runs_as_somebody_else_than_root_and_is_stopped_by_sigterm() -> None:
    found = dict(instructions())
    assert re.fullmatch("[1-9][0-9]*:[1-9][0-9]*", found["USER"])
    assert found["STOPSIGNAL"] == "SIGTERM"
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(number for number, name in enumerate(names) if name == "RUN")


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1), (None, 1)])
def test_the_health_check(status: int | None, expected: int) -> None:
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            assert status is not None
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"the reason")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listener:
        host, port = settings.load([], {}).admin or ("", 0)
        address = f"'{host}', {port}"
        check = words("HEALTHCHECK")
        assert address in check[-1]
        check[-1] = check[-1].replace(address, f"'{host}', {listener.server_port}")
        if status is None:
            listener.server_close()
        else:
            threading.Thread(target=listener.handle_request, daemon=True).start()
        result = subprocess.run(check, capture_output=True, text=True, timeout=support.DEADLINE, check=False)
    assert result.returncode == expected
    if status is not None:
        assert asked == ["/readyz"]
        assert result.stdout == "the reason\n"


def copied(folder: Path) -> None:
    """Copy into a folder what the Dockerfile copies into the image, of what .dockerignore lets through."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")]
    assert patterns[0] == "*"
    assert all(pattern.startswith("!") for pattern in patterns[1:])
    sent = [path for pattern in patterns[1:] for path in ROOT.glob(pattern[1:])]
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                found = [path for path in sent if path in ROOT.glob(source) or ROOT / source in path.parents]
                assert found, source
                for path in found:
                    (folder / target).mkdir(exist_ok=True)
                    shutil.copy(path, folder / target)


def test_only_the_program_goes_into_the_image_and_all_of_it(server: servers.Redis, tmp_path: Path) -> None:
    copied(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    folders = [ROOT, *(path.parent for path in ROOT.glob("*/__init__.py"))]
    program_of = [path for folder in folders for kind in ("*.py", "*.lua", "*.html") for path in folder.glob(kind)]
    assert names == {str(path.relative_to(ROOT)) for path in program_of} | {"requirements.txt"}
    program, *flags = support.command("--redis-url", server.url, *DAY)[1:]
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / Path(program).name), *flags], env=support.environment(), stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    log = support.Lines(process.stderr)
    try:
        port = log.wait_for(r"listening on http://127\.0\.0\.1:([0-9]+)")[1]
        with support.Client(("127.0.0.1", int(port))) as client:
            assert client.ask(support.accept(7)).status == 200
    finally:
        process.terminate()
        assert process.wait(support.DEADLINE) == 0
        log.join()


def own_pids() -> bool:
    """Whether a process may be made the first of a PID namespace here."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "true"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not own_pids(), reason="this user may not make namespaces")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_signals_arrive_at_the_first_process_of_a_container(server: servers.Redis, workers: str) -> None:
    prefix = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    flags = ["--redis-url", server.url, "--workers", workers, *DAY]
    program = support.Program(flags, prefix)
    try:
        program.listening(program.log.wait_for("listening on .*")[0])
        with support.Client(program.address) as client:
            assert client.ask(support.accept(7)).status == 200
        first = int(Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text())
        assert re.search(r"^NSpid:.*\t1$", Path(f"/proc/{first}/status").read_text(), re.MULTILINE)
        subprocess.run(["kill", "-TERM", str(first)], check=True)
        assert program.wait() == 0
        assert counted(server) == 1
    finally:
        program.end()


# verve.service


class Manager:
    """What listens for the states that a service tells, as systemd does."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.settimeout(support.DEADLINE)

    def __enter__(self) -> "Manager":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def wait_for(self, state: str) -> list[str]:
        """Return the states that were told before this one."""
        before = []
        while (told := self.socket.recv(100).decode()) != state:
            before.append(told)
        return before


@pytest.mark.parametrize("kind", ["/{}/notify", "@{}/notify"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_service_manager_is_told(
    server: servers.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str, kind: str
) -> None:
    address = kind.format(str(tmp_path).removeprefix("/"))
    kept = support.environment()
    monkeypatch.setattr(support, "environment", lambda: {**kept, "NOTIFY_SOCKET": address})
    flags = "--redis-url", server.url, "--workers", workers, "--drain-delay", "1", *DAY
    with Manager(address) as manager, support.verve(*flags) as program:
        assert set(manager.wait_for("READY=1")) <= {"WATCHDOG=1"}
        with support.Client(program.address) as client:  # so it was true
            assert client.ask(support.accept(7)).status == 200
        for _ in range(2):
            assert manager.wait_for("WATCHDOG=1") == []
        program.send(signal.SIGTERM)
        assert set(manager.wait_for("STOPPING=1")) <= {"WATCHDOG=1"}
        with support.Client(program.address) as client:  # it has only begun
            assert client.ask(support.accept(8)).status == 200
        assert program.wait() == 0


def test_nobody_to_tell_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = support.environment()
    monkeypatch.setattr(support, "environment", lambda: {**kept, "NOTIFY_SOCKET": str(tmp_path / "gone")})
    with support.verve(*DAY) as program, support.Client(program.address) as client:
        assert client.ask(support.accept(7)).status == 200


def test_the_service_of_systemd(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "verve.service").read_text()
    found = dict(re.findall(r"^#?([A-Z]\w+)=(.*)$", text, re.MULTILINE))
    assert found["Type"] == "notify"
    assert found["KillMode"] == "mixed"  # a worker that gets SIGTERM from systemd and its parent would end at once
    assert int(found["TimeoutStopSec"]) > settings.load([], {}).drain_timeout
    assert int(found["WatchdogSec"]) > 2 * settings.load([], {}).worker_timeout / 10
    program, script = found["ExecStart"].split()
    for variable in re.findall(r"^#Environment=(\w+)_FILE=", text, re.MULTILINE):
        assert variable.removeprefix("VERVE_").lower() in ("redis_url", "report_url", "report_secret")
    if shutil.which("systemd-analyze"):
        unit = tmp_path / "verve.service"
        unit.write_text(text.replace(program, sys.executable).replace(script, str(support.SERVER)))
        checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")
        secured = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit],
            capture_output=True,
            text=True,
            check=False,
        )
        assert secured.returncode == 0, secured.stdout
