"""What users send: the header fields of the requests, for wrk (load.lua), steady.c and openloop.py.

A load balancer adds addresses, ids and traces that differ in each request, so nothing a server remembers of one
request's header bytes helps with the next. To make such a request must cost the client little, as clients share one
core: what follows the id is two strings joined, each from a list that is prepared here. The lengths of the lists are
primes, so that the same pair comes back after 8.3 million requests.
"""

import random
from pathlib import Path

FIRST, SECOND = 2039, 4093
AGENTS = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.1"
    " Mobile/15E148 Safari/604.1",
    "Mozilla/5.0 (X11; Linux x86_64; rv:133.0) Gecko/20100101 Firefox/133.0",
    "okhttp/4.12.0",
)
DIFFER = "twelve fields that differ in each request, as a load balancer sends them"


def halves(kind: str) -> tuple[list[str], list[str]]:
    """Return the first and the second halves of what follows the id in a request.

    `kind`: "differ", as above; "same", twelve such fields with the same bytes each time; "host", Host alone.
    """
    if kind == "host":
        return [" HTTP/1.1\r\nHost: verve.example.com\r\n"], ["\r\n"]
    draw = random.Random(7)
    first, second = (FIRST, SECOND) if kind == "differ" else (1, 1)
    return [address_half(draw) for _ in range(first)], [trace_half(draw) for _ in range(second)]


def address_half(draw: random.Random) -> str:
    client = f"{draw.randint(1, 223)}.{draw.randint(0, 255)}.{draw.randint(0, 255)}.{draw.randint(1, 254)}"
    return (
        " HTTP/1.1\r\nHost: verve.example.com\r\n"
        f"X-Forwarded-For: {client}, 10.0.{draw.randint(0, 3)}.{draw.randint(1, 254)}\r\n"
        f"X-Forwarded-Proto: https\r\nX-Forwarded-Port: 443\r\nX-Real-IP: {client}\r\n"
        f"X-Request-Id: {draw.getrandbits(128):032x}\r\nUser-Agent: {draw.choice(AGENTS)}\r\n"
    )


def trace_half(draw: random.Random) -> str:
    return (
        "Accept: */*\r\nAccept-Encoding: gzip, deflate, br\r\nAccept-Language: en-GB,en;q=0.9\r\n"
        f"traceparent: 00-{draw.getrandbits(128):032x}-{draw.getrandbits(64):016x}-01\r\n"
        f"X-Amzn-Trace-Id: Root=1-{draw.getrandbits(32):08x}-{draw.getrandbits(96):024x}\r\n\r\n"
    )


def headers() -> list[str]:
    """Return the header fields of one request, one a string."""
    first, second = halves("same")
    return [field for field in (first[0] + second[0]).split("\r\n")[1:] if field]


def write(folder: str, kind: str) -> str:
    """Write the halves to two files, each string ended by a zero byte; return their path without the suffix."""
    for suffix, texts in zip(("first", "second"), halves(kind), strict=True):
        Path(folder, f"{kind}.{suffix}").write_bytes("".join(f"{text}\0" for text in texts).encode())
    return f"{folder}/{kind}"
