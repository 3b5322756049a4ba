"""What an error of Redis, or of the connection to it, means, and what to do about it, in one line.

Operators get what it means and the remedy first, then the error's own words, without anything that Redis repeats of
what it was sent: that may be a password, or ids. Where there is a remedy, waiting alone does not help.
"""

import re

from redis import ResponseError

ADVICE = {  # by a regular expression that is found in the error's words
    "^OOM ": "Redis is out of memory: raise its maxmemory, or count shorter windows",
    "^MISCONF ": "Redis can't save its data and takes no writes: see its log and disk",
    "^READONLY ": "this Redis is a replica: let --redis-url name the primary, or its sentinels",
    "^LOADING ": "Redis is loading its data",
    "^NOAUTH ": "Redis asks for a password: put it into --redis-url",
    "^WRONGPASS ": "Redis does not know this user and password: correct --redis-url",
    "^ERR AUTH .* without any password": "Redis has no password: take the one in --redis-url out",
    "^NOPERM ": "the Redis user may not do this: see docs/operations.md for what it needs",
    "^WRONGTYPE ": "keys of this prefix are used for something else: choose another --key-prefix",
    "^ERR DB index is out of range": "Redis has no database of this number: name a smaller one in --redis-url",
    "^CLUSTERDOWN ": "the cluster takes no ids of these parts: see CLUSTER INFO of its nodes; with "
    "cluster-require-full-coverage no, ids of slots that are not away are taken",
    "^it is a node of a cluster now": "this Redis is a node of a cluster now: restart Verve to count over all nodes",
    "^it is in no cluster": "a Redis that is in no cluster has the address of a node: let the node announce another "
    "(cluster-announce-ip or cluster-announce-port), or move that Redis",
    "^slots .* on no node": "the cluster is not complete: give each slot to a node (redis-cli --cluster fix)",
    "^a node .* announces no": "a node of the cluster tells nobody where it is: set its cluster-announce-hostname, "
    "or its cluster-preferred-endpoint-type to ip",
    "^announced as ": "a node can't be reached at the address that it announces: if it runs, set its "
    "cluster-announce-ip or cluster-announce-hostname to one that leads there from here, or open the network",
    "^it is a sentinel": "this is a sentinel: write redis+sentinel://HOST:PORT/NAME in --redis-url",
    "^no sentinel .*: NOAUTH": "the sentinels ask for a password: give that of their user default as "
    "--sentinel-password; no other user can be given",
    "^no sentinel .*: WRONGPASS": "the sentinels' user default has another password, or is off: correct "
    "--sentinel-password; no other user can be given",
    "^no sentinel .* without any password": "the sentinels' user default has no password: leave --sentinel-password "
    "out; no other user can be given",
    "^no sentinel .*: NOPERM": "the sentinels' user default may not ask for the primary: see docs/operations.md for "
    "what it needs",
    "^no sentinel .*No such master": "the sentinels know no primary of this name: correct it in --redis-url",
    "^no sentinel .*unknown command": "this is no sentinel: write redis://, not redis+sentinel://, in --redis-url",
    "^no sentinel .*: a connection without TLS": "the sentinels expect TLS: write rediss+sentinel:// in place of "
    "redis+sentinel:// in --redis-url",
    "^no sentinel .*: TLS is not": "the sentinels expect no TLS: name their ports for TLS (tls-port) in --redis-url, "
    "or write redis+sentinel://, which reaches the primary without TLS, too",
    "^a connection without TLS is not": "this Redis expects TLS: write rediss:// in place of redis:// in --redis-url",
    "^TLS is not": "this Redis expects no TLS: write redis:// in place of rediss:// in --redis-url",
    "can't use ssl_": "a file that --redis-url names for TLS can't be used: correct its name, rights or content",
    "certificate has expired|certificate is not yet valid": "Redis's certificate is not valid now: renew it, or set "
    "the clock",
    "mismatch, certificate is not valid for": "Redis's certificate is for another name: write one that it has in "
    "--redis-url (a node of a cluster must announce it: cluster-announce-hostname), or add ssl_check_hostname=false",
    "CERTIFICATE_VERIFY_FAILED": "Redis's certificate is signed by an authority that is not trusted: name the "
    "authority's file in --redis-url as ssl_ca_certs",
    "alert (certificate required|handshake failure)": "Redis asks for a client's certificate: name its files in "
    "--redis-url as ssl_certfile and ssl_keyfile",
    "alert (unknown ca|bad certificate|certificate unknown)": "Redis does not take this client's certificate: name "
    "another in --redis-url as ssl_certfile and ssl_keyfile",
}
LINK_ERRORS = ("READONLY", "MASTERDOWN", "LOADING", "NOAUTH")  # another connection may be better


def code_of(error: BaseException) -> str:
    """Return the first word of an error that Redis answered with, which says what kind it is."""
    return str(error).split(" ", 1)[0] if isinstance(error, ResponseError) else ""


def advise(error: BaseException) -> str:
    """Return what an error means and what to do, in one line of printable text."""
    words = str(error).partition(", with args beginning with")[0] or type(error).__name__
    text = " ".join(ascii(words)[1:-1].split())[:200]
    advice = next((advice for pattern, advice in ADVICE.items() if re.search(pattern, words)), "")
    return f"{advice} ({text})" if advice else text


def advice_in(text: str) -> str:
    """Return what `advise` said to do, without Redis's words, which may differ from time to time."""
    return next((advice for advice in ADVICE.values() if text.startswith(advice)), "")
