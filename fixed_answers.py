"""Answers that are prepared once and written many times.

All answers of Verve are fixed but for the second in which they are given. So each is rendered once a second in every
form that a request may ask for, and giving it is writing bytes that are ready: the connection is kept, or closed, or
kept for a client of HTTP/1.0, who has to be told; with the body, or without it for HEAD.
"""

from collections.abc import Mapping
from email.utils import formatdate

# Which form of an answer a request gets; those of HEAD are these plus HEAD.
KEEP, KEEP_1_0, CLOSE, HEAD = 0, 1, 2, 3


class FixedAnswer:
    """A response that never changes but for its Date, ready to be written.

    `forms[form]` is the whole response as bytes: KEEP, KEEP_1_0 or CLOSE, plus HEAD for one without its body.
    """

    __slots__ = ("_body", "_headers", "_line", "count", "forms", "status")

    def __init__(self, status: int, reason: str, body: bytes, headers: dict[str, str]) -> None:
        self.status = status
        self.count = 0  # how often it was given, besides what Outcomes counts
        self._line = f"HTTP/1.1 {status} {reason}\r\n".encode("ascii")
        headers = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("ascii")
        self._body = body
        self.forms: tuple[bytes, ...] = ()

    def render(self, date: bytes) -> None:
        """Make the forms anew with `date`, a header line."""
        start = self._line + date + self._headers
        heads = (start + b"\r\n", start + b"Connection: keep-alive\r\n\r\n", start + b"Connection: close\r\n\r\n")
        self.forms = (*(head + self._body for head in heads), *heads)


CONTINUE = FixedAnswer(100, "Continue", b"", {})  # RFC 9110, 15.2.1: has neither a Date nor a length
CONTINUE.forms = (b"HTTP/1.1 100 Continue\r\n\r\n",) * (2 * HEAD)


class FixedAnswers:
    """All answers of a server, rendered together."""

    def __init__(self) -> None:
        self.all: list[FixedAnswer] = []
        self._date = b""

    def add(self, status: int, reason: str, body: bytes, **headers: str) -> FixedAnswer:
        """Prepare an answer. `headers` are those of its own, `_` in their names standing for `-`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = FixedAnswer(status, reason, body, named)
        answer.render(self._date)
        self.all.append(answer)
        return answer

    def refuse(self, status: int, reason: str, error: str, **headers: str) -> FixedAnswer:
        """Prepare a `failed`, with the plain sentence that says why."""
        return self.add(status, reason, b"failed", Verve_Error=error, **headers)

    def render(self, now: float) -> None:
        """Render all with the Date of `now` (Unix seconds; RFC 9110, 6.6.1)."""
        self._date = f"Date: {formatdate(now, usegmt=True)}\r\n".encode("ascii")
        for answer in self.all:
            answer.render(self._date)


class Outcomes:
    """The answers that the handler's outcomes stand for, and how many were given of them on the shortest way."""

    __slots__ = ("answers", "counts", "kept")

    def __init__(self, answers: Mapping[int, FixedAnswer]) -> None:
        self.answers = answers
        self.kept: dict[int, bytes] = {}  # in the form KEEP, as nearly all are written
        self.counts = [0] * (max(answers) + 1)

    def render(self) -> None:
        """Take over the answers' new forms."""
        self.kept = {outcome: answer.forms[KEEP] for outcome, answer in self.answers.items()}
