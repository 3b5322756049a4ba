"""One request out of bytes: what its head says or why it is refused, and where its body ends.

Nothing here knows a connection, an answer or a clock. A request is read in one of two ways.

`simple_get` is one regular expression for what nearly every request is: a GET on HTTP/1.1 that came whole, with one
valid Host and no header that has a say in the framing. It vouches for the head as a whole, in a third of the time, or
does not match. What it matches, the other way reads with the same outcome; the tests compare them.

`RequestReader` reads everything else, in as many pieces as it comes. llhttp (httptools) reads a head as its bytes
arrive, so that malformed ones are refused at once and not after a time-out, and vouches for the syntax. What it lets
pass and RFC 9112 does not is refused by searches over the text when the blank line is in: versions but 1.0 and 1.1, two
spaces, codings but `chunked`, a Host that is missing, doubled or malformed. Each request has a parser of its own, so
that nothing of a request, its trailers for example, can have a say in the next one. A body is drained and not kept: one
of known length is counted, one in chunks is read by llhttp, with a head of ours before it.

What one request may hold; each is refused at one more:

    MAX_TARGET          bytes of the target                      414 (RFC 9110, 15.5.15)
    MAX_HEADERS_SIZE    bytes of all header lines with CRLF      431 (RFC 6585, 5)
    MAX_HEADERS         header lines                             431
    MAX_BODY            bytes of content                         413 (RFC 9110, 15.5.14)
    MAX_CHUNK_FRAMING   raw bytes for each byte of content in
                        chunks, besides MAX_HEADERS_SIZE         413
    MAX_LINE            bytes of a request line                  414
    MAX_SIMPLE          bytes of a head that simple_get reads    none: the other way reads it
    PIECE               bytes of chunks read in one call         none: the caller calls again
"""

import re
from collections.abc import Callable
from enum import Enum
from typing import Final, NamedTuple

import httptools

MAX_TARGET = 8 * 1024  # Apache 8190, nginx 8 KiB
MAX_HEADERS_SIZE = 32 * 1024  # nginx 4 times 8 KiB, Go 1 MiB
MAX_HEADERS = 100  # Apache 100
MAX_BODY = 64 * 1024  # nothing here has a use for one
MAX_LINE = MAX_TARGET + 64  # the target, the longest method that llhttp knows, the version
MAX_CHUNK_FRAMING = 6  # a body in chunks of one byte: "1\r\nx\r\n"
MAX_SIMPLE = 4 * 1024  # an idle connection keeps as much
PIECE = 16 * 1024  # 2,700 chunks of one byte, which take 1.7 ms

CHUNKED: Final = -1  # the length of a body that comes in chunks
UNKNOWN: Final = "unknown method"  # what llhttp has against a head whose other bytes it has not read

_TCHAR = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"  # RFC 9110, 5.6.2
_VISIBLE = rb'[!-"$-~]'  # what a target is made of: visible ASCII, and no fragment
_TARGET = rb"(?:/%b*+|[A-Za-z][A-Za-z0-9+.-]*+://%b++|\*|[][0-9A-Za-z:._~-]+:[0-9]+)" % (
    _VISIBLE,
    _VISIBLE,
)  # RFC 9112, 3.2
HOST = (  # RFC 3986, 3.2.2
    rb"(?:(?:[0-9A-Za-z._~!$&'()*+,;=-]++|%[0-9A-Fa-f]{2})++|\[[0-9A-Fa-f:.]+\])(?::[0-9]*+)?"
)

_line_so_far = re.compile(rb"%b+(?: (?:%b+(?: [HTP/1.0]*\r?)?)?)?" % (_TCHAR, _VISIBLE)).fullmatch
_line = re.compile(rb"(%b+) (%b) HTTP/1\.([01])\r\n" % (_TCHAR, _TARGET)).match
_headers_that_matter = re.compile(
    # of a section that llhttp has accepted, in lower case
    rb"\n(host|content-length|transfer-encoding|connection|expect):[ \t]*([^\r]*)"
).findall
_host = re.compile(HOST).fullmatch

# A header line that has no say in the framing: not Host, Content-Length or Transfer-Encoding, and Connection only if it
# asks for what HTTP/1.1 does anyway. Expect means nothing without a body (RFC 9110, 10.1.1), Upgrade is never taken.
_PLAIN_LINE = (
    rb"(?![hHcCtT](?i:ost|ontent-length|ransfer-encoding|onnection(?!:[ \t]*keep-alive[ \t]*\r)):)"
    rb"%b++:[\t -~\x80-\xff]*+\r\n" % _TCHAR
)


def simple(target: bytes) -> Callable[[bytes, int, int], re.Match[bytes] | None]:
    """Return what matches a simple request whose target the expression `target` matches.

    It takes bytes, where to begin, and an end at most MAX_SIMPLE further.
    """
    # Every repetition is possessive, so that it takes linear time: 1.6 us for 12 headers of 520 bytes, where the other
    # way takes 6.1 (a parser 0.3, llhttp 0.8, the headers that matter 1.0, counting lines 0.3, the rest is Python).
    return re.compile(
        rb"GET %b HTTP/1\.1\r\n(?:%b){0,%d}+(?i:host):[ \t]*+%b[ \t]*+\r\n(?:%b){0,%d}+\r\n"
        % (target, _PLAIN_LINE, MAX_HEADERS // 2 - 1, HOST, _PLAIN_LINE, MAX_HEADERS // 2)
    ).match


simple_get = simple(rb"(/%b{0,%d}+)" % (_VISIBLE, MAX_TARGET - 1))  # the group is the target


class Fault(Enum):
    """Why a request is refused: status, reason phrase, and what was expected."""

    MALFORMED = 400, "Bad Request", "the request is not well-formed HTTP/1.1"
    BAD_HOST = 400, "Bad Request", "expected exactly one valid Host"
    BAD_CODING = 400, "Bad Request", "expected no transfer coding but chunked, on HTTP/1.1"
    LONG_BODY = 413, "Content Too Large", f"expected a body of at most {MAX_BODY} bytes"
    LONG_TARGET = 414, "URI Too Long", f"expected a target of at most {MAX_TARGET} bytes"
    LONG_HEADERS = (
        431,
        "Request Header Fields Too Large",
        f"expected at most {MAX_HEADERS} headers of {MAX_HEADERS_SIZE} bytes in all",
    )


class Head(NamedTuple):
    """What a whole, valid head says."""

    method: bytes
    target: bytes
    old: bool  # the version is 1.0, not 1.1
    keeps: bool  # the connection may go on after the request (RFC 9112, 9.3)
    body: int = 0  # bytes that follow, or CHUNKED. 0 if the connection does not go on: what follows is not read
    expects: bool = False  # the client waits for 100 (Continue) before it sends the body (RFC 9110, 10.1.1)


class _Head:
    """A head that comes in pieces."""

    __slots__ = ("_parser", "text")

    def __init__(self) -> None:
        self.text = b""  # what came of it; the parser has it, but for a lone CR
        self._parser = httptools.HttpRequestParser(None)  # without callbacks

    def read(self, data: bytes, pos: int) -> tuple[Head | Fault | None, int]:
        """Go on with `data` from `pos`; return what is known, None for too little, and where the rest starts."""
        kept = fed = len(self.text)
        if kept:
            data, pos, kept = self.text + data[pos:], 0, kept - pos
            if self.text == b"\r":
                fed = 0
        line = _line(data, pos, pos + MAX_LINE)
        if line is None and not fed:
            begin = pos
            while data.startswith(b"\r\n", pos):  # empty lines before a request are ignored (RFC 9112, 2.2)
                pos += 2
            if pos == len(data) or data[pos:] == b"\r":  # half a line is not fed: llhttp takes a CR for a whole one
                self.text = data[pos:]
                return None, len(data) - kept
            if pos > begin:
                line = _line(data, pos, pos + MAX_LINE)
        stop = data.find(b"\r\n\r\n", max(pos, pos + fed - 3), pos + MAX_LINE + MAX_HEADERS_SIZE + 4)
        whole = stop >= 0
        stop = stop + 4 if whole else len(data)
        # What is past a limit is not looked at: it costs time, and would have a say in which fault is found if it came
        # in one piece with the rest.
        stop = min(stop, pos + MAX_LINE if line is None else line.end() + MAX_HEADERS_SIZE + 3)
        text = data[pos:stop]
        if line is not None and text.count(b"\n") > MAX_HEADERS + 2:
            text = b"\n".join([*text.split(b"\n", MAX_HEADERS + 3)[:-1], b""])
        self.text = text
        return _judge(text, line, whole, self._feed(text[fed:] if fed else text)), stop - kept

    def _feed(self, data: bytes) -> str:
        """Return what llhttp has against the head so far: "" for nothing, UNKNOWN for the method alone."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return ""
        except httptools.HttpParserInvalidMethodError:
            return UNKNOWN  # or no method at all: the line tells
        except httptools.HttpParserError as error:
            fault = str(error)
            return UNKNOWN if fault.startswith("Invalid method for") else fault  # one of RTSP, which llhttp knows
        return ""


def _judge(text: bytes, line: re.Match[bytes] | None, whole: bool, objection: str) -> Head | Fault | None:
    """Return what a head says, whose `text` is here up to its end or to what came of it; None if it may yet be valid.

    `line` is the match of its request line, if that is whole, and `objection` what llhttp has against it.
    """
    if line is None:
        if b"\r\n" in text or (objection and (objection != UNKNOWN or not _line_so_far(text))):
            return Fault.MALFORMED
        return Fault.LONG_TARGET if len(text) >= MAX_LINE else None
    method, target, minor = line.groups()
    if len(target) > MAX_TARGET:
        return Fault.LONG_TARGET
    if objection == UNKNOWN:  # llhttp has read nothing behind it, so the headers are not known either
        return Head(method, target, minor == b"0", keeps=False)
    if objection:
        return Fault.LONG_BODY if objection == "Content-Length overflow" else Fault.MALFORMED
    section = text[line.end() - line.start() - 2 :]
    if len(section) - 4 > MAX_HEADERS_SIZE or section.count(b"\n") - 2 > MAX_HEADERS:
        return Fault.LONG_HEADERS
    return _judge_headers(method, target, minor == b"0", section) if whole else None


def _judge_headers(method: bytes, target: bytes, old: bool, section: bytes) -> Head | Fault:
    """Return what a head says whose header section, from the CRLF before it on, llhttp has accepted."""
    body = hosts = 0
    expects = asked = closes = False
    for name, padded in _headers_that_matter(section.lower()):
        value = padded.rstrip(b" \t")
        if name == b"host":
            hosts += 1
            if hosts > 1 or not _host(value):
                return Fault.BAD_HOST
        elif name == b"transfer-encoding":
            if old or value != b"chunked":
                return Fault.BAD_CODING
            body = CHUNKED
        elif name == b"content-length":
            digits = value.lstrip(b"0")
            body = int(digits or b"0") if len(digits) < 9 else MAX_BODY + 1
        elif name == b"expect":
            expects = value == b"100-continue" and not old
        else:
            options = value.replace(b"\t", b" ").replace(b",", b" ").split(b" ")  # `x close` is no list, but closes
            closes = closes or b"close" in options
            asked = asked or b"keep-alive" in options
    if not (hosts or old):
        return Fault.BAD_HOST
    if body > MAX_BODY:
        return Fault.LONG_BODY
    if closes or (old and not asked) or method == b"CONNECT":
        return Head(method, target, old, keeps=False)
    return Head(method, target, old, keeps=True, body=body, expects=expects and body != 0)


class _Chunks:
    """What llhttp tells of a body in chunks."""

    __slots__ = ("content", "ended")

    def __init__(self) -> None:
        self.content = 0  # bytes without the framing
        self.ended = False

    def on_body(self, body: bytes) -> None:
        self.content += len(body)

    def on_message_complete(self) -> None:
        self.ended = True


class _ChunkedBody:
    """A body in chunks, with its trailers, which comes in pieces (RFC 9112, 7.1)."""

    __slots__ = ("_chunks", "_parser", "_raw")

    def __init__(self) -> None:
        self._raw = 0  # bytes with the framing
        self._chunks = _Chunks()
        self._parser = httptools.HttpRequestParser(self._chunks)
        self._parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")

    def read(self, data: bytes, pos: int) -> tuple[bool | Fault, int]:
        """Drain at most PIECE bytes of `data` from `pos` on; return whether it has ended, and where the rest starts."""
        # The last chunk and the trailers end in a blank line. Its first bytes may have come with an earlier read,
        # so the first three are fed one by one.
        stop = pos
        end = min(len(data), pos + PIECE)
        while stop < end:
            if stop - pos < 3:
                cut = stop + 1
            else:
                cut = data.find(b"\r\n\r\n", stop - 3, end)
                cut = cut + 4 if cut >= 0 else end
            self._raw += cut - stop
            try:
                self._parser.feed_data(data[stop:cut])
            except httptools.HttpParserError:
                return Fault.MALFORMED, len(data)
            content = self._chunks.content
            if content > MAX_BODY or self._raw > MAX_HEADERS_SIZE + MAX_CHUNK_FRAMING * content:
                return Fault.LONG_BODY, len(data)
            stop = cut
            if self._chunks.ended:
                return True, stop
        return False, stop


class RequestReader:
    """One request that comes in pieces.

    After each `read`: `fault` is why it is refused, or `whole` tells that all of it is in, or there is more to come.
    """

    __slots__ = ("_chunks", "_head", "_left", "fault", "head", "whole")

    def __init__(self) -> None:
        self._head = _Head()
        self._chunks: _ChunkedBody | None = None
        self._left = 0  # bytes of a body of known length that are to come
        self.head: Head | None = None  # once it is whole
        self.fault: Fault | None = None
        self.whole = False

    @property
    def begun(self) -> bool:
        """A byte of it has come; empty lines before it are not."""
        return self.head is not None or self._head.text != b""

    @property
    def wants_no_body(self) -> bool:
        """It is a HEAD, as far as is known: its answer has no body."""
        return self._head.text.startswith(b"HEAD ") if self.head is None else self.head.method == b"HEAD"

    def read(self, data: bytes, pos: int = 0) -> int:
        """Take of `data`, from `pos` on, the head, or some of the body if the head is in; return where the rest starts.

        If there is a rest and the request is neither refused nor whole, call again.
        """
        if self.head is None:
            found, stop = self._head.read(data, pos)
            if isinstance(found, Fault):
                self.fault = found
            elif found is not None:
                self.head = found
                self._head.text = b""  # up to 40 KiB, not to be kept while a body comes
                self._left = max(0, found.body)
                self._chunks = _ChunkedBody() if found.body == CHUNKED else None
                self.whole = found.body == 0
            return stop
        if self._chunks is not None:
            ended, stop = self._chunks.read(data, pos)
            if isinstance(ended, Fault):
                self.fault = ended
            else:
                self.whole = ended
            return stop
        stop = min(len(data), pos + self._left)
        self._left -= stop - pos
        self.whole = self._left == 0
        return stop


def read_head(data: bytes) -> Head | Fault | None:
    """Return what the head says that `data` begins with, or why it is refused; None if it is not whole."""
    return _Head().read(data, 0)[0]
