"""What an error of Redis means, and what to do about it, in one line.

Redis answers with an error whose first word tells its kind. Operators get what it means and the remedy first, then
Redis's own words, without anything that Redis repeats of what it was sent: that may be a password, or ids.
"""

from redis import ResponseError

ADVICE = {
    "OOM": "Redis is out of memory: raise its maxmemory, or count shorter windows",
    "MISCONF": "Redis can't save its data and takes no writes: see its log and disk",
    "READONLY": "this Redis is a replica: let --redis-url name the primary",
    "LOADING": "Redis is loading its data",
    "NOAUTH": "Redis asks for a password: put it into --redis-url",
    "WRONGPASS": "Redis does not know this user and password: correct --redis-url",
    "NOPERM": "the Redis user may not do this: see docs/operations.md for what it needs",
    "WRONGTYPE": "keys of this prefix are used for something else: choose another --key-prefix",
}
LINK_ERRORS = ("READONLY", "MASTERDOWN", "LOADING", "NOAUTH")  # another connection may be better


def code_of(error: BaseException) -> str:
    """Return the first word of an error that Redis answered with, which says what kind it is."""
    return str(error).split(" ", 1)[0] if isinstance(error, ResponseError) else ""


def advise(error: BaseException) -> str:
    """Return what an error means and what to do, in one line of printable text."""
    words = str(error).partition(", with args beginning with")[0] or type(error).__name__
    text = " ".join(ascii(words)[1:-1].split())[:200]
    advice = ADVICE.get(code_of(error))
    return f"{advice} ({text})" if advice else text


def advice_in(text: str) -> str:
    """Return what `advise` said to do, without Redis's words, which may differ from time to time."""
    return next((advice for advice in ADVICE.values() if text.startswith(advice)), "")
