"""What an operator sees of the settings: values in, or one line on stderr and exit status 2."""

import base64
import contextlib
import dataclasses
import io
import ipaddress
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import redis.asyncio
import support
from hypothesis import example, given
from hypothesis import strategies as st

import outbound
import settings
from redis_store import topology

KEY = bytes(range(32))
BASE64 = base64.b64encode(KEY).decode()

DEFAULTS = {
    "host": ("127.0.0.1", "127.0.0.1"),  # field: value, and how --help words it
    "port": (8080, "8080"),
    "workers": (1, "1"),
    "redis_url": (None, "none: in memory"),
    "sentinel_password": (None, "none"),
    "key_prefix": ("verve", "verve"),
    "window": (60, "60s"),
    "report_url": (None, "none"),
    "report_secret": (None, "none"),
    "callback_method": ("GET", "GET"),
    "callback_allow": ((), "public addresses only"),
    "log_file": (None, "stderr"),
    "log_format": ("text", "text"),
    "log_level": ("info", "info"),
    "admin": (("127.0.0.1", 8081), "127.0.0.1:8081"),
    "request_timeout": (1.0, "1s"),
    "idle_timeout": (75.0, "75s"),
    "header_timeout": (10.0, "10s"),
    "max_ids": (10_000_000, "10000000"),
    "max_connections": (20_000, "20000"),
    "drain_timeout": (8.0, "8s"),
    "drain_delay": (0.0, "0s"),
    "worker_timeout": (10.0, "10s"),
}

# What a flag needs beside it.
COMPANY = {"workers": ("--redis-url", "redis://h"), "report_secret": ("--report-url", "http://h/")}
SECRETS = ("redis_url", "report_url", "report_secret")
HIDDEN = (*SECRETS, "sentinel_password")  # nearly any text can be a password


def nets(*blocks: str) -> tuple[Any, ...]:
    return tuple(map(ipaddress.ip_network, blocks))


GOOD = [
    ("host", "0.0.0.0", "0.0.0.0"),
    ("host", "::", "::"),
    ("host", "[::1]", "::1"),
    ("host", "fe80::1%eth0", "fe80::1%eth0"),
    ("host", "localhost", "localhost"),
    ("host", "verve_1.example.com", "verve_1.example.com"),
    ("host", "x" * 63, "x" * 63),
    ("host", ".".join(["x" * 49] * 5 + ["x" * 3]), ".".join(["x" * 49] * 5 + ["x" * 3])),  # 253 characters
    ("port", "0", 0),
    ("port", "65535", 65535),
    ("workers", "4", 4),
    ("workers", "1024", 1024),
    ("redis_url", "redis://h", "redis://h"),
    ("redis_url", "redis://127.0.0.1:6379/15", "redis://127.0.0.1:6379/15"),
    ("redis_url", "redis://user:p%40ss@redis_1:6379/?db=3", "redis://user:p%40ss@redis_1:6379/?db=3"),
    ("redis_url", "REDISS://:pass@[::1]:6380", "REDISS://:pass@[::1]:6380"),
    ("redis_url", "redis://h1:6379,h2,[::1]:7000", "redis://h1:6379,h2,[::1]:7000"),
    ("redis_url", "rediss://u:p%2Css@a,b/0?ssl_ca_certs=/c", "rediss://u:p%2Css@a,b/0?ssl_ca_certs=/c"),
    ("redis_url", "redis://:p,ss@a,b?db=1", "redis://:p,ss@a,b?db=1"),
    ("redis_url", "unix:///run/redis.sock", "unix:///run/redis.sock"),
    ("redis_url", "unix://user:pass@/run/redis.sock?db=1", "unix://user:pass@/run/redis.sock?db=1"),
    ("redis_url", "redis+sentinel://h/main", "redis+sentinel://h/main"),
    (
        "redis_url",
        "redis+sentinel://:p%2Fss@a,b:5,[::1]:6/a.B-c_1/2",
        "redis+sentinel://:p%2Fss@a,b:5,[::1]:6/a.B-c_1/2",
    ),
    ("redis_url", "REDISS+Sentinel://h/m/?ssl_ca_certs=/c&db=1", "REDISS+Sentinel://h/m/?ssl_ca_certs=/c&db=1"),
    ("redis_url", "", None),
    ("sentinel_password", "pass word%20\xe9", "pass word%20\xe9"),
    ("sentinel_password", "", None),
    ("key_prefix", "x" * 128, "x" * 128),
    ("key_prefix", "!a|~z", "!a|~z"),
    ("window", "1", 1),
    ("window", "86400", 86400),
    ("report_url", "https://example.com", "https://example.com"),
    ("report_url", "http://u:p@[::1]:65535/a?b=c", "http://u:p@[::1]:65535/a?b=c"),
    ("report_url", "", None),
    ("report_secret", BASE64, KEY),
    ("report_secret", "whsec_" + BASE64, KEY),
    ("report_secret", base64.b64encode(KEY[:24]).decode(), KEY[:24]),
    ("report_secret", base64.b64encode(2 * KEY).decode(), 2 * KEY),
    ("report_secret", "", None),
    ("callback_method", "POST", "POST"),
    ("callback_allow", "127.0.0.0/8,10.1.0.0/16", nets("127.0.0.0/8", "10.1.0.0/16")),
    ("callback_allow", "fd00::/8, 169.254.169.254", nets("fd00::/8", "169.254.169.254/32")),
    ("callback_allow", "::1", nets("::1/128")),
    ("callback_allow", "0.0.0.0/0", nets("0.0.0.0/0")),
    ("callback_allow", "", ()),
    ("log_file", "/var/log/verve.log", "/var/log/verve.log"),
    ("log_file", "", None),
    ("log_format", "json", "json"),
    ("log_level", "debug", "debug"),
    ("log_level", "warning", "warning"),
    ("log_level", "error", "error"),
    ("admin", "off", None),
    ("admin", "0.0.0.0:9000", ("0.0.0.0", 9000)),
    ("admin", "[::1]:0", ("::1", 0)),
    ("admin", "localhost:65535", ("localhost", 65535)),
    ("request_timeout", "0.25", 0.25),
    ("idle_timeout", "86400", 86400.0),
    ("header_timeout", "0.000001", 0.000001),
    ("drain_timeout", "8", 8.0),
    ("drain_delay", "0", 0.0),
    ("drain_delay", "0.5", 0.5),
    ("drain_delay", "86400", 86400.0),
    ("worker_timeout", "1", 1.0),
    ("worker_timeout", "2.5", 2.5),
    ("max_ids", "1", 1),
    ("max_ids", "1000000000", 10**9),
    ("max_connections", "1", 1),
]

NUMBERS = ["", "0x10", "1_0", " 1", "1 ", "+1", "-1", "١", "1.0", "1e3", "9" * 5000, "ten"]  # noqa: RUF001
TIMES = ["", "0", "0.0", "86400.1", "nan", "inf", "1e3", "-1", ".5", "1.", "1_0", " 1", "١", "9" * 5000]  # noqa: RUF001
HOSTS = [
    "",
    " ",
    "a b",
    "256.1.1.1",
    "1.2.3",
    "8080",
    "[::g]",
    "[127.0.0.1]",
    "[a]",
    "[::1",
    "::1]",
    "[[::1]]",
    "[::1]:80",
    "[]",
    "::g",
    "a..b",
    "-a.b",
    "h/",
    "é",
    "x" * 64,
]
REDIS = "redis://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...][/DATABASE]"
SENTINEL = "redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/NAME[/DATABASE]"
SENTINELS = "sentinels as HOST[:PORT] with commas between"
NUMBER = "a number as the database"
HTTP = "an absolute http or https URL"
ASCII = "a URL in ASCII, without spaces"
CIDR = "CIDR blocks"

BAD = [
    *(("host", text, "an IP address or a host name") for text in HOSTS),
    *(("port", text, "an integer from 0 to 65535") for text in [*NUMBERS, "65536"]),
    *(("workers", text, "an integer from 1 to 1024") for text in [*NUMBERS, "0", "1025"]),
    *(("window", text, "an integer from 1 to 86400") for text in [*NUMBERS, "0", "86401"]),
    *(("max_ids", text, "an integer from 1 to 1000000000") for text in [*NUMBERS, "0", "1000000001"]),
    *(("max_connections", text, "an integer from 1 to 1000000000") for text in [*NUMBERS, "0", "1000000001"]),
    *(("request_timeout", text, "seconds above 0 and at most 86400") for text in TIMES),
    *(("idle_timeout", text, "seconds above 0 and at most 86400") for text in TIMES),
    *(("header_timeout", text, "seconds above 0 and at most 86400") for text in TIMES),
    *(("drain_timeout", text, "seconds above 0 and at most 86400") for text in TIMES),
    *(("drain_delay", text, "seconds from 0 to 86400") for text in TIMES if text not in ("0", "0.0")),
    *(("worker_timeout", text, "seconds from 1 to 86400") for text in [*TIMES, "0.999"]),
    ("host", ".".join(["x" * 49] * 5 + ["x" * 4]), "an IP address or a host name"),  # 254 characters
    *(("key_prefix", text, "1 to 128 characters, printable") for text in ["", "a b", "{a}", "é", "a\n", "x" * 129]),
    ("redis_url", "127.0.0.1:6379", REDIS),
    ("redis_url", "http://h", REDIS),
    ("redis_url", "redis:h", REDIS),
    ("redis_url", "redis://", REDIS),
    ("redis_url", "redis://:6379", REDIS),
    ("redis_url", "redis://user:pass@", REDIS),
    ("redis_url", "redis://h:", REDIS),
    ("redis_url", "redis://h:port", REDIS),
    ("redis_url", "redis://:pa/ss@h:6379", REDIS),
    ("redis_url", "redis://[::1", REDIS),
    ("redis_url", "redis://[::1]x:6379", REDIS),
    ("redis_url", "redis://h:123456", REDIS),
    *(
        ("redis_url", f"redis://{hosts}", REDIS)
        for hosts in (",", "a,", ",a", "a,,b", "a,b:", "a:b:5", "a,[::1", "a,b@")
    ),
    ("redis_url", "redis://a:1,b:2:3", REDIS),
    ("redis_url", "redis://a/0,b/0", NUMBER),
    ("redis_url", "redis://a,b:0", "a port from 1 to 65535"),
    ("redis_url", "redis://a,b:65536", "a port from 1 to 65535"),
    ("redis_url", "redis://a,b..c", "an IP address or a host name"),
    ("redis_url", "redis://a;b:5", "an IP address or a host name"),
    ("redis_url", "redis://a%2Cb", "an IP address or a host name"),
    ("redis_url", "redis://a,redis://b", REDIS),
    ("redis_url", "unix:///a,unix:///b?x=1", "no options after ?"),
    ("redis_url", "redis://h h", ASCII),
    ("redis_url", "redis://h\t", ASCII),
    ("redis_url", "redis://é", ASCII),
    ("redis_url", "redis://[::g]", "an IP address or a host name"),
    ("redis_url", "redis://1.2.3.400", "an IP address or a host name"),
    ("redis_url", "redis://h:0", "a port from 1 to 65535"),
    ("redis_url", "redis://h:65536", "a port from 1 to 65535"),
    ("redis_url", "redis://h/zero", NUMBER),
    ("redis_url", "redis://h/-1", NUMBER),
    ("redis_url", "redis://h/0/1", NUMBER),
    ("redis_url", "redis://h?db=", NUMBER),
    ("redis_url", "redis://h/??db=1", "no options after ?"),
    ("redis_url", "redis://:p[ss@h", REDIS),
    ("redis_url", "redis://:p[s]s@h", REDIS),
    ("redis_url", "redis://[::1]@5", REDIS),
    ("redis_url", "redis://:pa#ss@h", "without a fragment"),
    ("redis_url", "unix://", "unix:///PATH"),
    ("redis_url", "unix:///", "unix:///PATH"),
    ("redis_url", "unix://run/redis.sock", "unix:///PATH"),
    ("redis_url", "unix:///run/redis.sock?db=x", NUMBER),
    ("redis_url", "redis+sentinel://h", SENTINEL),
    ("redis_url", "redis+sentinel://h/", SENTINEL),
    ("redis_url", "redis+sentinel://h//0", SENTINEL),
    ("redis_url", "redis+sentinel://h/a%20b", SENTINEL),
    ("redis_url", "redis+sentinel:///main", SENTINELS),
    ("redis_url", "redis+sentinel://a,/main", SENTINELS),
    ("redis_url", "redis+sentinel://a;b:5/main:", SENTINEL),
    ("redis_url", "redis+sentinel://a:b/main", SENTINELS),
    ("redis_url", "redis+sentinel://a,b:0/main", "a port from 1 to 65535"),
    ("redis_url", "redis+sentinel://a,b..c/main", "an IP address or a host name"),
    ("redis_url", "redis+sentinel://h/main/x", NUMBER),
    ("redis_url", "redis+sentinel://h/main/0/1", NUMBER),
    ("redis_url", "redis+sentinel://h/main?ssl_ca_certs=/c", "no options after ?"),
    ("redis_url", "unix+sentinel:///run/redis.sock", REDIS),
    *(("sentinel_password", text, "a password without control characters") for text in ["a\n", "\t", "\x7f"]),
    ("report_url", "example.com", HTTP),
    ("report_url", "/path", HTTP),
    ("report_url", "ftp://h/", HTTP),
    ("report_url", "http://", HTTP),
    ("report_url", "http:///path", HTTP),
    ("report_url", "http://u:p@/", HTTP),
    ("report_url", "http://h:/", HTTP),
    ("report_url", "http://h/a b", ASCII),
    ("report_url", "http://h/\r\nx: y", ASCII),
    ("report_url", "http://h/é", ASCII),
    ("report_url", "http://h:0/", "a port from 1 to 65535"),
    ("report_url", "http://h:65536/", "a port from 1 to 65535"),
    ("report_url", "http://h%41/", HTTP),
    ("report_url", "http://[::g]/", HTTP),
    ("report_url", "http://[:::]/", "an IPv6 address in brackets"),
    ("report_url", "http://127.1/", "an IPv4 address as four decimal numbers"),
    ("report_url", "http://a..b/", "a host name or an address"),
    ("report_url", "http://h/#top", "without a fragment"),
    *(
        ("report_secret", text, "base64, padded, of 24 to 64 bytes")
        for text in [
            "whsec_",
            "whsec_" + BASE64.rstrip("="),
            BASE64 + "=",
            BASE64 + "\n",
            "whsec_whsec_" + BASE64,
            base64.urlsafe_b64encode(b"\xff" * 32).decode(),
            base64.b64encode(KEY[:23]).decode(),
            base64.b64encode(2 * KEY + b"x").decode(),
            "correct horse battery staple",
        ]
    ),
    *(("callback_method", text, "GET or POST") for text in ["", "get", "PUT", "GET\n"]),
    *(("callback_allow", text, CIDR) for text in [",", "10.0.0.0/8,", "h", "10.0.0.0/33", "::/129", "10/8"]),
    *(("callback_allow", text, CIDR) for text in ["10.0.0.0/", "10.0.0.0/0.0.0.0", "fe80::%eth0/64", "1"]),
    ("callback_allow", "10.1.2.3/16", "10.1.0.0/16"),
    ("callback_allow", "::1/128,fd00::1/8", "fd00::/8"),
    *(("log_file", text, "a path without control characters") for text in ["a\nb", "\0", "\x7f"]),
    *(("log_format", text, "text or json") for text in ["", "xml", "JSON"]),
    *(("log_level", text, "debug, info, warning or error") for text in ["", "trace", "20"]),
    *(("admin", text, "HOST:PORT") for text in ["", "on", "8081", ":8081", "h:", "::1:8081", "[::1]", "h:p"]),
    ("admin", "127.0.0.1:65536", "a port from 0 to 65535"),
    ("admin", "256.0.0.1:1", "an IP address or a host name"),
]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    return "VERVE_" + name.upper()


def load(*argv: str, env: Mapping[str, str] | None = None) -> settings.Settings:
    """Load with nothing of this process's own environment."""
    return settings.load(argv, env or {}, outbound.parse)


class Refusals:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *argv: str, env: Mapping[str, str] | None = None) -> str:
        """The message of a load that is refused: one line after the program's name, and status 2."""
        with pytest.raises(SystemExit) as stop:
            load(*argv, env=env)
        out, err = self.capsys.readouterr()
        assert stop.value.code == 2
        assert out == ""
        return one_line(err)


def one_line(err: str) -> str:
    assert err.startswith("verve_server.py: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert err.isascii()
    assert len(err) < 1000
    return err[:-1].removeprefix("verve_server.py: ")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refusals:
    return Refusals(capsys)


def test_the_tables_here_know_every_setting() -> None:
    names = {setting.name for setting in dataclasses.fields(settings.Settings)}
    assert names == set(DEFAULTS)
    assert names == {name for name, _, _ in GOOD} == {name for name, _, _ in BAD}


def test_defaults() -> None:
    assert dataclasses.asdict(load()) == {name: value for name, (value, _) in DEFAULTS.items()}


def test_the_process_is_the_default_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["verve_server.py", "--port", "81"])
    monkeypatch.setenv("VERVE_WINDOW", "10")
    loaded = settings.load()
    assert (loaded.port, loaded.window) == (81, 10)
    loaded = settings.load([], {})
    assert (loaded.port, loaded.window) == (8080, 60), "what is handed in is all there is, empty or not"


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_good_values(name: str, text: str, value: object) -> None:
    company = COMPANY.get(name, ())
    assert getattr(load(flag(name), text, *company), name) == value
    assert getattr(load(f"{flag(name)}={text}", *company), name) == value
    by_environment = load(*company, env={variable(name): text})
    assert getattr(by_environment, name) == (value if text else DEFAULTS[name][0])


@pytest.mark.parametrize(("name", "text", "expected"), BAD)
def test_bad_values(refused: Refusals, name: str, text: str, expected: str) -> None:
    company = COMPANY.get(name, ())
    from_flag = refused(f"{flag(name)}={text}", *company)
    assert from_flag.startswith(f"{flag(name)}: expected ")
    assert expected in from_flag
    if text:
        from_environment = refused(*company, env={variable(name): text})
        assert from_environment == from_flag.replace(flag(name), variable(name), 1)


@pytest.mark.parametrize(("name", "text", "value"), [row for row in GOOD if row[1]])
def test_the_flag_wins_over_the_environment_even_a_bad_one(name: str, text: str, value: object) -> None:
    company = COMPANY.get(name, ())
    for other in ("\x01", DEFAULTS[name][1]):
        assert getattr(load(flag(name), text, *company, env={variable(name): other}), name) == value


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_empty_variable_counts_as_unset(name: str) -> None:
    assert load(env={variable(name): ""}) == load()


@pytest.mark.parametrize("name", [*HIDDEN, "callback_allow", "log_file"])
def test_an_empty_flag_takes_an_optional_setting_back(name: str) -> None:
    assert load(flag(name), "", env={variable(name): "\x01"}) == load()


def test_the_last_of_a_repeated_flag_wins() -> None:
    assert load("--port", "http", "--port", "1", "--port=2").port == 2


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prot", "81"], "unknown flag '--prot'; did you mean --port?"),
        (["--redis_url=redis://:hunter2@h"], "unknown flag '--redis_url'; did you mean --redis-url?"),
        (["--report_secret", "hunter2"], "unknown flag '--report_secret'; did you mean --report-secret?"),
        (["--por", "81"], "unknown flag '--por'; did you mean --port?"),  # no abbreviations
        (["--qqqq"], "unknown flag '--qqqq'; --help lists all"),
        (["-x"], "unknown flag '-x'; --help lists all"),
        (["--a\nb\x1b"], "unknown flag '--a\\nb\\x1b'; --help lists all"),
        (["hunter2"], "expected --flag value, got a value without a flag"),
        (["--port", "81", "hunter2"], "expected --flag value, got a value without a flag"),
        (["--port"], "--port: expected one argument"),
        (["--port", "--window", "1"], "--port: expected one argument"),
    ],
)
def test_what_is_no_flag(refused: Refusals, argv: Sequence[str], message: str) -> None:
    assert refused(*argv) == message


def test_what_was_given_is_shown_harmless_and_short(refused: Refusals) -> None:
    assert refused("--port", "a\n\x1b[31m\u2028é'").endswith(r''', got "a\n\x1b[31m\u2028\xe9'"''')
    assert refused("--port", "9" * 60).endswith(", got '" + "9" * 60 + "'")
    assert refused("--port", "9" * 61).endswith(", got '" + "9" * 60 + "'...")
    assert len(refused("--port", "\U0001f600" * 5000)) < 800
    assert len(refused("--" + "p" * 5000)) < 200


NO_SECRETS = ["hunter2", "redis://u:hunter2@h:x", "http://u:hunter2@[/", "whsec_hunter2"]


@pytest.mark.parametrize(
    ("name", "text"), [("sentinel_password", "hunter2\n"), *itertools.product(SECRETS, NO_SECRETS)]
)
def test_secrets_are_never_shown(refused: Refusals, name: str, text: str) -> None:
    for message in (refused(flag(name), text), refused(env={variable(name): text})):
        assert "hunter2" not in message
        assert message.endswith("got a value that is not shown here")


def test_settings_can_be_logged() -> None:
    loaded = load(
        "--redis-url",
        "redis://:hunter2@h",
        "--report-url",
        "http://u:hunter2@h/",
        "--report-secret",
        BASE64,
        "--sentinel-password",
        "hunter2",
    )
    assert "hunter2" not in repr(loaded)
    assert repr(KEY) not in repr(loaded)
    assert "port=8080" in repr(loaded)


FROM_FILES = [
    ("redis_url", "redis://:hunter2@h", "redis://:hunter2@h"),
    ("sentinel_password", "hunter2 ", "hunter2 "),
    ("report_url", "https://u:hunter2@example.com/hook", "https://u:hunter2@example.com/hook"),
    ("report_secret", "whsec_" + BASE64, KEY),
]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize(("name", "text", "value"), FROM_FILES)
def test_a_secret_may_stand_in_a_file(tmp_path: Path, name: str, text: str, value: object, end: str) -> None:
    file = tmp_path / "secret"
    file.write_bytes((text + end).encode())
    env = {f"{variable(name)}_FILE": str(file), "REDIS_URL": "redis://other"}
    assert getattr(load(*COMPANY.get(name, ()), env=env), name) == value
    assert getattr(load(*COMPANY.get(name, ()), env=env | {variable(name): ""}), name) == value


@pytest.mark.parametrize(("name", "text", "value"), FROM_FILES)
def test_a_flag_wins_over_a_file_that_is_not_there(name: str, text: str, value: object) -> None:
    env = {f"{variable(name)}_FILE": "/nowhere", variable(name): "hunter2"}
    assert getattr(load(flag(name), text, *COMPANY.get(name, ()), env=env), name) == value


@pytest.mark.parametrize("name", HIDDEN)
def test_an_empty_name_of_a_file_counts_as_unset(name: str) -> None:
    assert load(env={f"{variable(name)}_FILE": ""}) == load()


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't read the file that it names: No such file or directory"),
        (b"", "expected a file of 1 to 8192 characters, got none"),
        (b"\n", "expected a file of 1 to 8192 characters, got none"),
        (b"hunter2" * 1200, "expected a file of 1 to 8192 characters, got more"),
        (b"hunter2", "got a value that is not shown here"),
        (b"hunter2\n\n", "got a value that is not shown here"),
        (b"redis://u:hunter2@h\nredis://h", "got a value that is not shown here"),
        (b"\xff\xfe\0", "got a value that is not shown here"),
    ],
)
def test_a_file_that_holds_no_secret_is_refused(
    refused: Refusals, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    file = tmp_path / "hunter2"
    if content is not None:
        file.write_bytes(content)
    said = refused(env={f"{variable(name)}_FILE": str(file)})
    assert said.startswith(f"{variable(name)}_FILE: ")
    assert said.endswith(message)
    assert "hunter2" not in said


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("path", ["/", "\0", "x" * 5000])
def test_what_is_no_file_is_refused(refused: Refusals, name: str, path: str) -> None:
    assert refused(env={f"{variable(name)}_FILE": path}).startswith(f"{variable(name)}_FILE: can't read the file")


@pytest.mark.parametrize(("name", "text", "_"), FROM_FILES)
def test_a_secret_is_given_once(refused: Refusals, tmp_path: Path, name: str, text: str, _: object) -> None:
    file = tmp_path / "secret"
    file.write_text(text)
    said = refused(env={variable(name): text, f"{variable(name)}_FILE": str(file)})
    assert said == f"{variable(name)} and {variable(name)}_FILE: expected one of them, got both"


def test_only_secrets_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "window"
    file.write_text("10")
    assert load(env={"VERVE_WINDOW_FILE": str(file)}) == load()


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({}, ""),
        ({"VERVE_PORT": "1", "VERVE_REDIS_URL_FILE": "/x", "VERVE": "1", "REDIS_URL": "x", "verve_x": "1"}, ""),
        ({"VERVE_PROT": "hunter2"}, "'VERVE_PROT' (did you mean VERVE_PORT?)"),
        ({"VERVE_REPORT_SECRETS": "hunter2"}, "'VERVE_REPORT_SECRETS' (did you mean VERVE_REPORT_SECRET?)"),
        ({"VERVE_QQQQQQ": "hunter2"}, "'VERVE_QQQQQQ'"),
        ({"VERVE_\n": "hunter2"}, "'VERVE_\\n'"),
        ({"VERVE_Y": "", "VERVE_X": ""}, "'VERVE_X', 'VERVE_Y'"),
        (
            {f"VERVE_QQQQQQ{number}": "" for number in range(7)},
            "'VERVE_QQQQQQ0', 'VERVE_QQQQQQ1', 'VERVE_QQQQQQ2', 'VERVE_QQQQQQ3', 'VERVE_QQQQQQ4' and 2 more",
        ),
    ],
)
def test_variables_that_are_no_settings_are_named(env: Mapping[str, str], line: str) -> None:
    assert settings.unknown_variables(env) == (f"variables that are no settings: {line}" if line else "")


def test_an_unknown_variable_is_warned_of_in_one_line() -> None:
    prefix = ("env", "VERVE_PROT=hunter2", "VERVE_QQQQQQ=hunter2")
    with support.verve(prefix=prefix) as program:
        pass
    (line,) = [line for line in program.log.all if "VERVE_" in line]
    assert " WARNING verve: variables that are no settings: 'VERVE_PROT' (did you mean VERVE_PORT?), " in line
    assert "hunter2" not in "\n".join(program.log.all)


ADDR, PORT = "REDIS_PORT_6379_TCP_ADDR", "REDIS_PORT_6379_TCP_PORT"
LINK = {ADDR: "172.17.0.2", PORT: "6380"}


@pytest.mark.parametrize(
    ("argv", "env", "url"),
    [
        ([], LINK, "redis://172.17.0.2:6380"),
        ([], {ADDR: "fd00::2", PORT: "6379"}, "redis://[fd00::2]:6379"),
        ([], {ADDR: "redis"}, "redis://redis:6379"),
        ([], {PORT: "6379"}, None),
        ([], {**LINK, "REDIS_URL": "redis://b"}, "redis://b"),
        ([], {**LINK, "REDIS_URL": ""}, "redis://172.17.0.2:6380"),
        ([], {**LINK, "REDIS_URL": "redis://b", "VERVE_REDIS_URL": "redis://a"}, "redis://a"),
        ([], {**LINK, "REDIS_URL": "redis://b", "VERVE_REDIS_URL": ""}, "redis://b"),
        ([], {ADDR: "a/b", "REDIS_URL": "redis://b"}, "redis://b"),
        (["--redis-url", "redis://f"], {**LINK, "REDIS_URL": "\x01"}, "redis://f"),
        (["--redis-url", ""], {**LINK, "REDIS_URL": "redis://b", "VERVE_REDIS_URL": "redis://a"}, None),
    ],
)
def test_where_redis_is_found(argv: Sequence[str], env: Mapping[str, str], url: str | None) -> None:
    assert load(*argv, env=env).redis_url == url


@pytest.mark.parametrize(
    ("env", "source"),
    [
        ({"REDIS_URL": "hunter2"}, "REDIS_URL"),
        ({ADDR: "u@h", PORT: "6379"}, f"{ADDR} and {PORT}"),
        ({ADDR: "h/0?x=", PORT: "6379"}, f"{ADDR} and {PORT}"),
        ({ADDR: "h", PORT: "tcp"}, f"{ADDR} and {PORT}"),
        ({ADDR: "h", PORT: "6379/1"}, f"{ADDR} and {PORT}"),
        ({ADDR: "\udcff"}, f"{ADDR} and {PORT}"),
    ],
)
def test_a_bad_redis_elsewhere_is_named(refused: Refusals, env: Mapping[str, str], source: str) -> None:
    assert refused(env=env).startswith(f"{source}: expected ")


def test_more_workers_need_redis(refused: Refusals) -> None:
    assert refused("--workers", "2").startswith("--workers: more than 1 needs --redis-url")
    assert refused(env={"VERVE_WORKERS": "2"}).startswith("VERVE_WORKERS: more than 1 needs --redis-url")
    assert refused("--workers", "2", "--redis-url", "", env=LINK).startswith("--workers: more than 1 needs")
    assert load("--workers", "2", env=LINK).workers == 2


def test_a_secret_needs_a_url(refused: Refusals) -> None:
    assert refused("--report-secret", BASE64).startswith("--report-secret: needs --report-url")
    assert refused(env={"VERVE_REPORT_SECRET": BASE64}).startswith("VERVE_REPORT_SECRET: needs --report-url")


def render_help(capsys: pytest.CaptureFixture[str], **given: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        load("--help", **given)
    out, err = capsys.readouterr()
    assert stop.value.code == 0
    assert err == ""
    return out


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_help_lists_every_flag_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = render_help(capsys, env={"VERVE_PORT": "a bad one is no matter"})
    entries = {entry.split()[0]: " ".join(entry.split()) for entry in re.split(r"\n  (?=--)|\n\n", text)}
    for name, (_, default) in DEFAULTS.items():
        assert entries[flag(name)].endswith(f"[{default}]")
    prose = " ".join(text.split())
    assert f"verve {settings.VERSION}" in prose
    assert "VERVE_KEY_PREFIX" in prose
    assert ADDR in prose
    assert "python verve_server.py --redis-url redis://127.0.0.1:6379" in prose
    if columns != "40":  # the examples are not wrapped
        assert max(map(len, text.splitlines())) <= min(int(columns), 100)


def outcome(argv: Sequence[str], env: Mapping[str, str]) -> tuple[object, str]:
    """Exit status, or None for settings that load, and what stands on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            load(*argv, env=env)
        except SystemExit as stop:
            return stop.code, err.getvalue()
    return None, err.getvalue()


TEXTS = st.one_of(
    st.text(),
    st.text("0123456789.:/@[]%#?,-=abdefhioprtsux \n"),
    st.builds(str.__add__, st.sampled_from(["redis://", "unix://", "http://", "whsec_", "-", "--"]), st.text()),
)


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@given(name=st.sampled_from(sorted(DEFAULTS)), text=TEXTS)
@example(name="host", text="--")
def test_any_text_loads_or_is_refused_in_one_line(name: str, text: str) -> None:
    for argv, env in (([f"{flag(name)}={text}"], {}), ([flag(name), text], {}), ([], {variable(name): text})):
        status, err = outcome([*argv, *COMPANY.get(name, ())], env)
        assert status in (None, 2)
        if status:
            assert one_line(err).startswith((flag(name), variable(name)))
        else:
            assert err == ""


@hypothesis.settings(max_examples=500, deadline=None, database=None)
@given(
    start=st.sampled_from(
        [
            *("redis://", "redis://h/", "redis://h,", "rediss://h?ssl_certfile=", "unix://", "unix:///p?db=1"),
            *(
                "redis+sentinel://",
                "redis+sentinel://h,",
                "redis+sentinel://h/m",
                "rediss+sentinel://h/m?ssl_certfile=",
            ),
        ]
    ),
    rest=st.text("[]:@/?&=%;.,hdb1", max_size=12),
)
@example(start="redis://", rest="[@h")
@example(start="redis://h/", rest="??db=1")
def test_a_redis_url_that_loads_is_one_that_the_client_takes(start: str, rest: str) -> None:
    url = start + rest
    if outcome(["--redis-url", url], {}) == (None, ""):
        direct, hosts, _ = topology.split(url)
        redis.asyncio.ConnectionPool.from_url(direct).make_connection()  # type: ignore[no-untyped-call]
        assert all(host and 0 < port < 65536 for host, port in hosts)
        assert topology.place(url)
