"""Flags and environment into one frozen dataclass.

The class `Settings` is the whole table: a field is a flag. Its name makes the flag and the variable
(`redis_url`: `--redis-url`, `VERVE_REDIS_URL`), its entry says how the text is read, which text is the
default, and what `--help` tells. CONTRIBUTING.md says where else a new setting is named.

A flag beats the environment, the environment beats the default. An empty variable counts as unset, since
compose files and shells make them so easily; an empty flag is meant, and sets an optional setting (a URL, the
secret, the log file) back to none. Only the text that wins is read: a bad variable under a good flag is no error.

A command line and, in a container, an environment can be read by others. So a value that may hold a password (the
URLs, the secret) may also stand in a file that VERVE_REDIS_URL_FILE, for one, names. Such a value is never part of
a message, and `repr` does not show it.

Everything is checked once, by `load`, before anything is started. The rest of the program gets the dataclass and
never looks at the environment. What is wrong is said in one line on stderr that names the flag or the variable,
then what was expected, then what was given; the exit status is 2. A URL of Redis is split by the grammar of
RFC 3986 and not by urllib, which drops tabs and newlines and reads brackets differently from one Python to the next.
"""

import argparse
import base64
import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface
from itertools import groupby
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

__all__ = ["VERSION", "Settings", "load", "unknown_variables"]

T = TypeVar("T")

VERSION = "1.1.0"  # stands only here; CHANGELOG.md says what it brought
DAY = 86400  # seconds; the longest window and the longest time-out
SECRET_BYTES = range(24, 65)  # Standard Webhooks: "between 24 bytes (192 bits) and 64 bytes (512 bits)"
SHOWN_CHARACTERS = 60  # of a refused value: enough to recognise it in one line
MAX_SECRET = 8192  # characters of a file that holds a secret
NAMED = 5  # unknown variables that a warning names; Kubernetes sets a dozen for a Service that is called verve
LINK = ("REDIS_PORT_6379_TCP_ADDR", "REDIS_PORT_6379_TCP_PORT")  # as docker's --link NAME:redis sets them
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")  # of redis-py's URLs
LEVELS = "debug, info, warning or error"

# RFC 3986, appendix B, without user and password, in which brackets are written %5B and %5D.
URL = re.compile(r"([A-Za-z]+(?:\+(?i:sentinel))?)://(?:[^/?\[\]]*@)?([^/?@]*)((?:/[^?]*)?)(?:\?(.*))?")
HOST_PORT = re.compile(r"(?:\[([^\[\]]*:[^\[\]]*)\]|([^\[\]:]+))(?::([0-9]{1,5}))?")
LABEL = "[0-9A-Za-z_][0-9A-Za-z_-]{0,62}"  # RFC 1123, section 2.1, and the underscore of compose's services
NAME = re.compile(rf"(?!.{{254}})(?:{LABEL}\.)*(?![0-9]+\.?$){LABEL}\.?")  # digits last: a mistyped address
ADDRESS = re.compile("[0-9A-Fa-f:.]+(?:%[0-9A-Za-z_.-]+)?")
BLOCK = re.compile("[0-9A-Fa-f:.]+(?:/[0-9]{1,3})?")


# The readers: text in, value out. Their ValueError says what was expected; `load` adds what was given.
def matching(pattern: str, expected: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise ValueError(expected)

    return read


def integer(lowest: int, highest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if re.fullmatch("[0-9]{1,18}", text) and lowest <= int(text) <= highest:
            return int(text)
        raise ValueError(f"an integer from {lowest} to {highest}")

    return read


def seconds(text: str) -> float:
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) and 0 < float(text) <= DAY:
        return float(text)
    raise ValueError(f"seconds above 0 and at most {DAY}, such as 10 or 0.5")


def seconds_from(lowest: int) -> Callable[[str], float]:
    def read(text: str) -> float:
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) and lowest <= float(text) <= DAY:
            return float(text)
        raise ValueError(f"seconds from {lowest} to {DAY}, such as 10 or 2.5")

    return read


def optional(read: Callable[[str], T]) -> Callable[[str], T | None]:
    return lambda text: read(text) if text else None


# Without {}, which would be Redis Cluster's hash tag.
key_part = matching("[!-z|~]{1,128}", "1 to 128 characters, printable ASCII, no spaces, no {}")
password = matching("[^\0-\x1f\x7f]+", "a password without control characters")
log_path = matching("[^\0-\x1f\x7f]+", "a path without control characters")


def host_name(text: str) -> str:
    if not NAME.fullmatch(text):
        try:
            ip_address(text if ADDRESS.fullmatch(text) else "")
        except ValueError:
            raise ValueError("an IP address or a host name") from None
    return text


def listening_host(text: str) -> str:
    return host_name(text[1:-1] if re.fullmatch(r"\[.*:.*\]", text) else text)  # an IPv6 address as in a URL


def host_port(text: str, expected: str, lowest: int = 1) -> tuple[str, int | None]:
    match = HOST_PORT.fullmatch(text)
    if match is None:
        raise ValueError(expected)
    if match[3] and not lowest <= int(match[3]) <= 65535:
        raise ValueError(f"a port from {lowest} to 65535")
    return host_name(match[1] or match[2]), int(match[3]) if match[3] else None


def admin_address(text: str) -> tuple[str, int] | None:
    if text == "off":
        return None
    name, port = host_port(text if ":" in text else "", expected := "HOST:PORT, [IPV6]:PORT or off", lowest=0)
    if port is None:
        raise ValueError(expected)
    return name, port


def redis(text: str) -> str:
    expected = (
        "redis://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...][/DATABASE], the same with rediss://, or unix:///PATH"
    )
    match = URL.fullmatch(no_fragment(text))
    if match is None:
        raise ValueError(expected)
    scheme, server, path, query = match[1].lower(), match[2], match[3], match[4] or ""
    options = [(name, value) for name, _, value in (option.partition("=") for option in query.split("&") if option)]
    databases = [value for name, value in options if name == "db"]
    if not {name for name, _ in options} <= {"db", *(TLS_OPTIONS if scheme.startswith("rediss") else ())}:
        raise ValueError(f"no options after ? but db and, with rediss://, {', '.join(TLS_OPTIONS)}")
    if not all(re.fullmatch("(?i:true|false)", value) for name, value in options if name == "ssl_check_hostname"):
        raise ValueError("true or false for ssl_check_hostname")
    if dict(options).get("ssl_keyfile") and not dict(options).get("ssl_certfile"):
        raise ValueError("ssl_certfile beside ssl_keyfile")
    if scheme in ("redis+sentinel", "rediss+sentinel"):
        primary = re.fullmatch(r"/([0-9A-Za-z._-]+)(?:/(.*))?", path)
        if primary is None:
            raise ValueError("redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/NAME[/DATABASE]")
        for host in server.split(","):
            host_port(host, "sentinels as HOST[:PORT] with commas between")
        databases += [primary[2]] if primary[2] else []
    elif scheme in ("redis", "rediss"):
        for host in server.split(","):
            host_port(host, expected + " (/ in a password is written %2F)")
        databases += [path[1:]] if len(path) > 1 else []
    elif scheme != "unix" or server or len(path) < 2:
        raise ValueError(expected)
    if not all(re.fullmatch("[0-9]{1,9}", database) for database in databases):
        raise ValueError("a number as the database, as in /0 or ?db=0")
    return text


def no_fragment(text: str) -> str:
    if not re.fullmatch("[!-~]+", text):
        raise ValueError("a URL in ASCII, without spaces")
    if "#" in text:
        raise ValueError("a URL without a fragment (in a password, write # as %23)")
    return text


def secret(text: str) -> bytes:
    text = text.removeprefix("whsec_")
    padded = len(text) % 4 == 0 and re.fullmatch("[0-9A-Za-z+/]+={0,2}", text)
    key = base64.b64decode(text) if padded else b""
    if len(key) not in SECRET_BYTES:
        raise ValueError("base64, padded, of 24 to 64 bytes, with or without whsec_ before it")
    return key


def networks(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    blocks = []
    for item in (item.strip(" ") for item in text.split(",") if text):
        try:
            given = ip_interface(item if BLOCK.fullmatch(item) else "")
        except ValueError:
            raise ValueError("CIDR blocks with commas between, such as 127.0.0.0/8,fd00::/8") from None
        if given.ip != given.network.network_address:
            raise ValueError(f"{given.network}, without bits set after the first {given.network.prefixlen}")
        blocks.append(given.network)
    return tuple(blocks)


def flag(
    group: str, metavar: str, read: Callable[[str], T], default: str, about: str, words: str = "", hidden: bool = False
) -> T:
    """Return a field of Settings. `default` is text as a user writes it; --help shows `words` instead, if given."""
    told = f"{default}s" if metavar == "SECONDS" else words or default
    shown = {"metavar": metavar, "help": f"{about} [{told}]"}
    return field(default=read(default), repr=not hidden, metadata={"group": group, "read": read, "shown": shown})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting, checked: one field for each flag. A hidden one may hold a password, and no error shows it."""

    host: str = flag("listening", "ADDRESS", listening_host, "127.0.0.1", "IP address or host name to listen on")
    port: int = flag("listening", "PORT", integer(0, 65535), "8080", "port to listen on; 0 takes any free one")
    workers: int = flag("listening", "N", integer(1, 1024), "1", "processes sharing the port; above 1 with Redis only")
    admin: tuple[str, int] | None = flag(
        "listening", "HOST:PORT", admin_address, "127.0.0.1:8081", "the operators' listener, or off"
    )

    redis_url: str | None = flag(
        "counting",
        "URL",
        optional(redis),
        "",
        "redis://, rediss://, unix://, redis+sentinel://",
        "none: in memory",
        hidden=True,
    )
    sentinel_password: str | None = flag(
        "counting", "TEXT", optional(password), "", "of the sentinels, if they have one", "none", hidden=True
    )
    key_prefix: str = flag("counting", "TEXT", key_part, "verve", "first part of every Redis key")
    window: int = flag("counting", "SECONDS", integer(1, DAY), "60", f"window length, 1 to {DAY}, aligned to the epoch")
    max_ids: int = flag("counting", "N", integer(1, 10**9), "10000000", "ids of one window in a process's own memory")

    report_url: str | None = flag(
        "telling", "URL", optional(no_fragment), "", "each window's report is POSTed here", "none", hidden=True
    )
    report_secret: bytes | None = flag(
        "telling", "BASE64", optional(secret), "", "signs reports as Standard Webhooks does", "none", hidden=True
    )
    callback_method: str = flag(
        "telling", "GET|POST", matching("GET|POST", "GET or POST"), "GET", "how the endpoint of a request is called"
    )
    callback_allow: tuple[IPv4Network | IPv6Network, ...] = flag(
        "telling", "CIDR,...", networks, "", "what callbacks may also reach", "public addresses only"
    )

    request_timeout: float = flag("limits", "SECONDS", seconds, "1", "wait for the store before a request fails")
    header_timeout: float = flag("limits", "SECONDS", seconds, "10", "time for a request's headers and body to arrive")
    idle_timeout: float = flag("limits", "SECONDS", seconds, "75", "life of an idle keep-alive connection")
    drain_timeout: float = flag("limits", "SECONDS", seconds, "8", "time to finish requests and reports when stopping")
    drain_delay: float = flag(
        "limits", "SECONDS", seconds_from(0), "0", "time after SIGTERM in which connections are still taken"
    )
    worker_timeout: float = flag(
        "limits", "SECONDS", seconds_from(1), "10", "a worker that hangs for so long is killed and replaced"
    )
    max_connections: int = flag(
        "limits", "N", integer(1, 10**9), "20000", "open client connections; further ones get 503"
    )

    log_file: str | None = flag(
        "logging", "PATH", optional(log_path), "", "file to log to; logrotate may move it", "stderr"
    )
    log_format: str = flag(
        "logging", "text|json", matching("text|json", "text or json"), "text", "json is one object a line"
    )
    log_level: str = flag("logging", "LEVEL", matching("debug|info|warning|error", LEVELS), "info", LEVELS)


ABOUT = "Counts distinct integer ids per window of time, exactly, and tells the number. Defaults in [brackets]."
RULES = (
    "Each flag is an environment variable too: --key-prefix is VERVE_KEY_PREFIX. The flag wins. An empty "
    "variable counts as unset; an empty flag (--report-url '') means none, where there can be none.",
    "Secrets are better kept out of the command line, which every user of the machine can read: VERVE_REDIS_URL_FILE, "
    "VERVE_SENTINEL_PASSWORD_FILE, VERVE_REPORT_URL_FILE and VERVE_REPORT_SECRET_FILE name files that hold them.",
    "redis:// and rediss:// may name several addresses with commas between, redis://HOST:PORT,HOST:PORT: they are "
    "tried in turn. Of a cluster, which is found out from the server, some nodes are enough; it has no /DATABASE.",
    "With rediss://, what TLS needs stands behind a ? with & between: ssl_ca_certs=PATH (the authorities to trust, "
    "in place of the system's), ssl_certfile=PATH and ssl_keyfile=PATH (a certificate of this client and its key), "
    "ssl_check_hostname=false (take a certificate for another name).",
    "redis+sentinel://HOST:PORT,HOST:PORT/NAME asks sentinels where the primary NAME is, and follows it. A user, a "
    "password and /DATABASE behind the name are for the primary, --sentinel-password is for the sentinels; "
    "rediss+sentinel:// is TLS to them all.",
    f"Without --redis-url, REDIS_URL is used, and then docker's link pair {LINK[0]} and {LINK[1]}; "
    "--redis-url '' counts in memory whatever they say.",
)
EXAMPLES = """\
examples:
  python verve_server.py                      # in memory, one process
  python verve_server.py --redis-url redis://127.0.0.1:6379 --workers 4
  VERVE_WINDOW=10 python verve_server.py --host 0.0.0.0 --log-format json"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}\n")


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def shown(text: str) -> str:
    return ascii(text[:SHOWN_CHARACTERS]) + ("..." if len(text) > SHOWN_CHARACTERS else "")


def unexpected(word: str) -> str:
    name = word.partition("=")[0][: SHOWN_CHARACTERS + 1]  # what follows may be a secret
    if not name.startswith("-"):  # after a misspelt flag, this may be a secret
        return "expected --flag value, got a value without a flag"
    near = difflib.get_close_matches(name, [flag_name(setting.name) for setting in fields(Settings)], 1)
    return f"unknown flag {shown(name)}; " + (f"did you mean {near[0]}?" if near else "--help lists all")


def make_parser() -> Parser:
    width = max(40, min(shutil.get_terminal_size().columns, 100)) - 2
    fill = partial(textwrap.fill, width=width, break_on_hyphens=False)
    parser = Parser(
        prog="verve_server.py",
        usage="%(prog)s [--flag value]...",
        description=fill(ABOUT),
        epilog="\n\n".join([*map(fill, RULES), EXAMPLES]),
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=width),
        add_help=False,
        allow_abbrev=False,
    )
    for title, settings in groupby(fields(Settings), lambda setting: setting.metadata["group"]):
        group = parser.add_argument_group(title)
        for setting in settings:
            group.add_argument(flag_name(setting.name), **setting.metadata["shown"])
    group = parser.add_argument_group("help")
    group.add_argument("-h", "--help", action="help", help="show this and exit")
    version = f"verve {VERSION}"
    group.add_argument("--version", action="version", version=version, help=f"show {version!r} and exit")
    return parser


def variable(name: str) -> str:
    return "VERVE_" + name.upper()


def find(setting: Field[Any], from_flag: Any, environ: Mapping[str, str]) -> tuple[str, str | None]:
    """Return where a setting's text comes from, for errors, and the text, or None if it is not given.

    Raises ValueError, in words that name the source, if it is given twice or its file can't be read.
    """
    name = setting.name
    source = variable(name)
    if from_flag is not None:
        return flag_name(name), "--" if from_flag == [] else from_flag  # argparse of 3.11: [] for --flag=--
    text = environ.get(source)
    if not setting.repr and (path := environ.get(f"{source}_FILE")):
        if text:
            raise ValueError(f"{source} and {source}_FILE: expected one of them, got both")
        return f"{source}_FILE", read_secret(f"{source}_FILE", path)
    if name == "redis_url" and not text:
        source = "REDIS_URL"
        text = environ.get(source)
        if not text and (address := environ.get(LINK[0])):
            server = f"[{address}]" if ":" in address else address
            port = environ.get(LINK[1]) or "6379"  # as the variable's name says
            # Quoted, so that an address with an @ or / in it is refused and not read as something else.
            return " and ".join(LINK), "redis://" + quote(f"{server}:{port}", safe="[:]", errors="replace")
    return source, text or None


def read_secret(source: str, path: str) -> str:
    """Return the text of a file, without the newline at its end. Raises ValueError that shows neither text nor path."""
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            text = file.read(MAX_SECRET + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or "no path of a file"
        raise ValueError(f"{source}: can't read the file that it names: {why}") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text or len(text) > MAX_SECRET:
        raise ValueError(f"{source}: expected a file of 1 to {MAX_SECRET} characters, got {'more' if text else 'none'}")
    return text


def unknown_variables(environ: Mapping[str, str] | None = None) -> str:
    """Return a line that names the variables VERVE_... that are no settings, and the nearest setting; or ""."""
    environ = os.environ if environ is None else environ
    known = [setting.name.upper() for setting in fields(Settings)]
    known += [setting.name.upper() + "_FILE" for setting in fields(Settings) if not setting.repr]
    names = sorted(name.removeprefix("VERVE_") for name in environ if name.startswith("VERVE_"))
    words = []
    for name in [name for name in names if name not in known]:
        near = difflib.get_close_matches(name, known, 1)
        words.append(shown("VERVE_" + name) + (f" (did you mean VERVE_{near[0]}?)" if near else ""))
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return f"variables that are no settings: {', '.join(words[:NAMED])}{more}" if words else ""


def manager() -> str:
    """Return where the service manager listens for the state of the service; "" if there is none (sd_notify(3))."""
    return os.environ.get("NOTIFY_SOCKET", "")


def load(
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    check_url: Callable[[bytes], object] | None = None,
) -> Settings:
    """Read the command line (without the program's name) and the environment.

    `check_url` raises ValueError for a URL to which nothing can be POSTed. Raises SystemExit: 2 after one line on
    stderr if anything is wrong, 0 after --help or --version on stdout.
    """
    environ = os.environ if environ is None else environ
    parser = make_parser()
    given, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(unexpected(rest[0]))

    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in fields(Settings):
        try:
            source, text = find(setting, getattr(given, setting.name), environ)
        except ValueError as error:
            parser.error(str(error))
        if text is None:
            continue
        try:
            values[setting.name] = setting.metadata["read"](text)
            if check_url and setting.name == "report_url" and text:
                check_url(text.encode("ascii"))
        except ValueError as error:
            expected = str(error).removeprefix("expected ")
            actual = shown(text) if setting.repr else "a value that is not shown here"
            parser.error(f"{source}: expected {expected}, got {actual}")
        sources[setting.name] = source

    settings = Settings(**values)
    if settings.workers > 1 and settings.redis_url is None:
        parser.error(f"{sources['workers']}: more than 1 needs --redis-url, so that they count together")
    if settings.admin == (settings.host, settings.port) and settings.port:
        parser.error(f"--admin: expected another address than --host and --port have, got {settings.port} for both")
    if settings.report_secret is not None and settings.report_url is None:
        parser.error(f"{sources['report_secret']}: needs --report-url, whose reports it signs")
    return settings
