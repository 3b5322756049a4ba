"""Where Redis is: what a URL says, read by redis-py's public `parse_url`.

There is one node today, the one that the URL names.
"""

from typing import Any

import redis.asyncio.connection

from redis_store.wire import Address

DEFAULTS = {"host": "localhost", "port": 6379, "db": 0}  # of redis-py's URLs


def address(url: str) -> Address:
    """Return how to connect to the server that a URL names. Raises ValueError."""
    parsed = redis.asyncio.connection.parse_url(url)
    tls = issubclass(parsed.get("connection_class", object), redis.asyncio.SSLConnection)
    options: dict[str, Any] = {**DEFAULTS, **parsed}
    return Address(
        host=options["host"],
        port=options["port"],
        path=options.get("path", ""),
        database=options["db"],
        username=options.get("username", ""),
        password=options.get("password", ""),
        tls=tls,
        ca_certs=options.get("ssl_ca_certs"),
        certfile=options.get("ssl_certfile"),
        keyfile=options.get("ssl_keyfile"),
        check_hostname=options.get("ssl_check_hostname", True),
    )


def place(url: str) -> str:
    """Return where a Redis URL leads, in words and without its secrets."""
    found = address(url)
    return f"Redis at {found.path or f'{found.host}:{found.port}'}, database {found.database}"
