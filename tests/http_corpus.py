"""Requests for the tests and for the fuzzer: malformed, odd but valid, the last of a connection, several in a row."""

from http_peers import HOST, NEXT, START, chunked, framed, get, line, words

# Strictness (RFC 9112)

# Request lines (3); ends of line are CR LF, both and in that order (2.2)
LINES = words(
    r"GET  /a HTTP/1.1|GET /a  HTTP/1.1|GET\t/a HTTP/1.1|GET /a\tHTTP/1.1| GET /a HTTP/1.1|\tGET /a HTTP/1.1"
    r"|GET /a HTTP/1.1 |GET /a HTTP/1.1\t|\0GET /a HTTP/1.1|/a HTTP/1.1| /a HTTP/1.1|GET HTTP/1.1|GET  HTTP/1.1|GET"
    r"|GET |HTTP/1.1 200 OK|GET /a|GET /a |GET /a H|GET /a HTTP/|GET /a HTTP/1|GET /a HTTP/1.|GET /a HTTP/1.1x"
    r"|GET /a HTTP/1.11|GET /a HTTP/0.9|GET /a HTTP/2.0|GET /a HTTP/1.2|GET /a HTTP/1.9|GET /a HTTP/0.0|GET /a HTTP/3"
    r"|GET /a HTTP/1,1|GET /a HTTP/11|GET /a HTTP/01.1|GET /a HTTP/1.01|GET /a HTTP/1. 1|GET /a HTTP/+1.1"
    r"|GET /a HTTP/-1.1|GET /a HTTP/1.x|GET /a HTTP/x.1|GET /a http/1.1|GET /a Http/1.1|GET /a HTTP /1.1"
    r"|GET /a HTTPS/1.1|GET /a RTSP/1.0|GET /a ICE/1.0|GET /a HTTP/ 1.1|GET /a HTTP\\1.1|GET /a TTP/1.1"
    r"|GET /a HTTP/1.1 HTTP/1.1|GET /a HTTP//1.1|GET /a \0HTTP/1.1|G@T /a HTTP/1.1|GET( /a HTTP/1.1|G\xc9T /a HTTP/1.1"
    r"|GE\0T /a HTTP/1.1|GET: /a HTTP/1.1|G T /a HTTP/1.1|\x22GET\x22 /a HTTP/1.1|G\rT /a HTTP/1.1|GET\x7f /a HTTP/1.1"
    r"|GET api/verve/accept?id=7 HTTP/1.1|GET ?id=7 HTTP/1.1|GET a/b HTTP/1.1|GET a.b:80 HTTP/1.1|GET /a#b HTTP/1.1"
    r"|GET # HTTP/1.1|GET /a b HTTP/1.1|GET /\0 HTTP/1.1|GET /\x01 HTTP/1.1|GET /\x7f HTTP/1.1|GET /\x80 HTTP/1.1"
    r"|GET /\xff HTTP/1.1|GET /\xc3\xa9 HTTP/1.1|GET /a\rb HTTP/1.1|GET /a\nb HTTP/1.1|GET /a\x0bb HTTP/1.1"
    r"|GET /a\x0cb HTTP/1.1|PRI * HTTP/2.0|\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03|OPTIONS ** HTTP/1.1"
    r"|GET /a HTTP/1.1\nX: y|GET /a HTTP/1.1\rX: y|GET /a HTTP/1.1\r\r\nX: y|GET /a HTTP/1.1\n\rX: y"
    r"|\nGET /a HTTP/1.1|\rGET /a HTTP/1.1|\r\r\nGET /a HTTP/1.1|\r\n\nGET /a HTTP/1.1|\r\n GET /a HTTP/1.1"
    r"|GET *\r\nX:80 HTTP/1.1|GET a\r\nX:80 HTTP/1.1"
)
# Fields, of a request that is well-formed besides (5; Host: 3.2; lengths: RFC 9110, 8.6; codings: 6.1)
FIELD_LINES = words(
    r"X : y|X\t: y|X |X|: y|:| X: y|\tX: y|X y: z|X\0: y|X\x7f: y|X(: y|X@: y|X/: y|X[: y|\x22X\x22: y|X,: y|X;: y"
    r"|X{: y|\xe9: y|X\xff: y|X: a\0b|X: \0|X: a\x01b|X: a\x08b|X: a\x0bb|X: a\x0cb|X: a\x1fb|X: a\x7fb|\x1fX: y|X=y"
    r"|X: a\rb|X: a\nb|X: a\r|X: \r\r|X: a\r\n b|X: a\r\n\tb|X: a\r\n |X:\r\n b|X: a\r\n \r\nY: b|X: a\nY: b|X: a\rY: b"
    r"|X: y\n|X: y\r\n\n|X: y\n\n|X: y\r\n\rZ|X: y\r\r\n"
    r"|Transfer-Encoding : chunked|Content-Length : 5|Host: a|Host: b|hOST: a|Host:|X: y\r\nHost: a"
    r"|Content-Length: 5\r\nContent-Length: 6|Content-Length: 5\r\nContent-Length: 5"
    r"|Content-Length: 0\r\nX: y\r\ncontent-length: 0|Content-Length: 5\r\nTransfer-Encoding: chunked"
    r"|Transfer-Encoding: chunked\r\nContent-Length: 5|Transfer-Encoding: chunked\r\nContent-Length: 0"
    r"|Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked|Transfer-Encoding: chunked\r\nTransfer-Encoding: x"
    r"|Transfer-Encoding: identity\r\nTransfer-Encoding: chunked"
)
HOSTS = words(
    r"a b|a, b|a/b|a/|http://a|u@a|a:b|a:80:80|a:80x|a:+80|a:-1|[::1|::1|[zz]|[::1]x|[]|x[::1]|[::1]:x|a#b|a?b|\x22a\x22"
    r"|<a>|a\\b|\xe9|a\xff|a\x7cb|a^b|{a}|`a`|a%|a%4|a%zz|a\tb"
)
LENGTHS = words(
    r"| |+5|-5|-0|0x5|5x|x|5 5|5,5|5, 5|5,|,5|5;|5.0|1e1|5_0|\xb2|\xd9\xa5|'5'|\x225\x22|5\0|five|-9223372036854775808"
)
CODINGS = words(
    r"gzip|identity|gzip, chunked|chunked, gzip|chunked, chunked|chunked;q=1|xchunked|chunkedx|chunk|\x22chunked\x22|0"
    r"|chunked chunked|\x0bchunked|chunked\0|chun ked|chunked; x|x;chunked|cow|\xffchunked|deflate|trailers"
)
CHUNKS = words(  # 7.1
    r"5\nhello\r\n0\r\n\r\n|5\r\nhello\n0\r\n\r\n|5\r\nhello0\r\n\r\n|5\r\nhello\r0\r\n\r\n|5\rhello\r\n0\r\n\r\n"
    r"|4\r\nhello\r\n0\r\n\r\n|5\r\nhelloXX0\r\n\r\n|6\r\nhello\r\n0\r\n\r\n| 5\r\nhello\r\n0\r\n\r\n"
    r"|\t5\r\nhello\r\n0\r\n\r\n|\r\n5\r\nhello\r\n0\r\n\r\n|0x5\r\nhello\r\n0\r\n\r\n|+5\r\nhello\r\n0\r\n\r\n"
    r"|-5\r\nhello\r\n0\r\n\r\n|g\r\nx\r\n0\r\n\r\n|;x\r\n0\r\n\r\n|\r\n\r\n|5h\r\nhello\r\n0\r\n\r\n|5,\r\nhello\r\n"
    r"|\xb2\r\nhi\r\n|5;\0\r\nhello\r\n0\r\n\r\n|5;x\nhello\r\n0\r\n\r\n|5;x\rhello\r\n0\r\n\r\n|5_0\r\nhello\r\n"
    r"|5;x=\x01\r\nhello\r\n0\r\n\r\n|5.0\r\nhello\r\n|5 5\r\nhello\r\n|hello|0\n\n|0\r\n\n|0\r\r\n\r\n|0\r\n\r\r\n"
    r"|0 0\r\n\r\n|0\r\nX : y\r\n\r\n|0\r\nX\r\n\r\n|0\r\n: y\r\n\r\n|0\r\nX: a\0\r\n\r\n|0\r\nX: a\n\r\n"
    r"|0\r\nX: a\r\n b\r\n\r\n|0\r\n X: a\r\n\r\n|0\r\nX y: z\r\n\r\n|0\r\nX: a\rb\r\n\r\n"
)
CASES = [
    *map(line, LINES),
    *(get().replace(b"\r\n", end) for end in words(r"\n|\r|\n\r|\r\r\n")),
    *(line(START, HOST + field + b"\r\n") for field in FIELD_LINES),
    *(
        line(START, fields)
        for fields in words(r"|X-Host: a\r\nHosts: a\r\nX: Host: a\r\n|Host:\r\n a\r\n| Host: a\r\n")
    ),
    *(
        line(START, fields)
        for fields in words(r"\tHost: a\r\n| X: y\r\nHost: a\r\n|Host : a\r\n|Host: a\n|Host: a\r\r\n")
    ),
    *(line(START, b"Host: " + host + b"\r\n") for host in HOSTS),
    line(b"GET http://a" + START[4:], b""),
    *(
        get(7, fields, version=b"HTTP/1.0")
        for fields in (HOST * 2, b"Host: a/b\r\n", b"Transfer-Encoding: chunked\r\n")
    ),
    *(framed(b"Content-Length: " + length + b"\r\n", b"hello") for length in LENGTHS),
    *(framed(b"Transfer-Encoding: " + coding + b"\r\n", b"0\r\n\r\n") for coding in CODINGS),
    *map(chunked, CHUNKS),
]
MALFORMED = {repr(case)[2:-1].replace(repr(get())[2:-5], "GET 7"): case for case in CASES}


ODD: dict[str, tuple[bytes, int]] = {  # valid, and its status; the connection goes on
    "CRLF ahead": (b"\r\n" + get(), 200),
    "CRLFs ahead": (b"\r\n" * 5 + get(), 200),
    "empty value": (framed(b"X:\r\n"), 200),
    "empty value and space": (framed(b"X: \r\n"), 200),
    "empty value and tabs": (framed(b"X: \t \t\r\n"), 200),
    "no space": (get(7, b"Host:a\r\nX:y\r\n"), 200),
    "tabs around": (get(7, b"Host:\t a \t\r\nX:\ty\t\r\n"), 200),
    "tab within": (framed(b"X: a\tb\r\n"), 200),
    "obs-text": (framed(b"X: \x80\xe9\xff\r\n"), 200),
    "colons": (framed(b"X::\r\nY: : :\r\n"), 200),
    "all of a token": (framed(b"!#$%&'*+-.^_`|~09AZaz: y\r\n"), 200),
    "lower case": (get(7, b"host: a\r\ncontent-length: 2\r\n") + b"hi", 200),
    "upper case": (get(7, b"HOST: A\r\nTRANSFER-ENCODING: CHUNKED\r\n") + b"0\r\n\r\n", 200),
    "Host with port": (get(7, b"Host: a.b-c.example:8080\r\n"), 200),
    "Host with empty port": (get(7, b"Host: a:\r\n"), 200),
    "Host of IPv4": (get(7, b"Host: 127.0.0.1:80\r\n"), 200),
    "Host of IPv6": (get(7, b"Host: [::1]:80\r\n"), 200),
    "Host of IPv6 and IPv4": (get(7, b"Host: [::FFFF:127.0.0.1]\r\n"), 200),
    "Host of a container": (get(7, b"Host: verve_1\r\n"), 200),
    "Host of sub-delims": (get(7, b"Host: a!$&'()*+,;=~%41\r\n"), 200),
    "fields that only look like it": (framed(b"X-Host: b\r\nXContent-Length: 9\r\nTransfer-Encodings: x\r\n"), 200),
    "a value that only looks like it": (framed(b"X: Host: b\r\nY: Content-Length: 9\r\n"), 200),
    "underscores for dashes": (framed(b"Content_Length: 9\r\nTransfer_Encoding: chunked\r\n"), 200),
    "length 0": (framed(b"Content-Length: 0\r\n"), 200),
    "length with zeros": (framed(b"Content-Length: 005\r\n", b"hello"), 200),
    "length and spaces": (framed(b"Content-Length: \t5 \r\n", b"hello"), 200),
    "length and many spaces": (framed(b"Content-Length: %b5%b\r\n" % (b" " * 20, b" \t" * 20), b"hello"), 200),
    "body like a request": (framed(b"Content-Length: %d\r\n" % len(NEXT), NEXT), 200),
    "Chunked": (framed(b"Transfer-Encoding: Chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n"), 200),
    "chunked and spaces": (framed(b"Transfer-Encoding:chunked  \r\n", b"0\r\n\r\n"), 200),
    "chunk like a request": (chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(NEXT), NEXT)), 200),
    "chunk of blank lines": (chunked(b"A\r\n\r\n\r\n\r\n\r\n\r\n\r\n0\r\n\r\n"), 200),
    "chunk size in both cases": (chunked(b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n"), 200),
    "chunk size with zeros": (chunked(b"00000005\r\nhello\r\n000\r\n\r\n"), 200),
    "chunk extensions": (chunked(b'5;a;b=c;d="e f"\r\nhello\r\n0;x\r\n\r\n'), 200),
    "trailers": (chunked(b"0\r\nX: y\r\nY:\r\nZ: \xff\r\n\r\n"), 200),
    "Upgrade": (framed(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n"), 200),
    "Upgrade to websocket": (framed(b"Connection: upgrade\r\nUpgrade: websocket\r\n"), 200),
    "Upgrade not connected": (framed(b"Upgrade: h2c\r\nContent-Length: 5\r\n", b"hello"), 200),
    "Connection: Upgrade alone": (framed(b"Connection: Upgrade\r\n"), 200),
    "Connection: keep-alive": (framed(b"Connection: Keep-Alive\r\n"), 200),
    "Connection of others": (framed(b"Connection: x, closed, y\r\n"), 200),
    "HEAD": (get(method=b"HEAD"), 200),
    "HEAD with a body": (get(7, HOST + b"Content-Length: 5\r\n", b"HEAD") + b"hello", 200),
    "absolute-form": (line(b"GET http://a" + START[4:]), 200),
    "absolute-form, another Host": (line(b"GET http://b" + START[4:]), 200),
    "asterisk-form": (line(b"OPTIONS * HTTP/1.1"), 404),
    "POST": (get(7, HOST + b"Content-Length: 5\r\n", b"POST") + b"hello", 405),
    "1.0 kept": (get(7, b"Connection: keep-alive\r\n", version=b"HTTP/1.0"), 200),
    "1.0 kept, with Host and body": (
        get(7, HOST + b"connection: Keep-Alive\r\nContent-Length: 5\r\n", version=b"HTTP/1.0") + b"hello",
        200,
    ),
}


LAST = {  # valid requests behind which the connection is closed
    "close": framed(b"Connection: close\r\n"),
    "Close": framed(b"Connection: Close\r\n"),
    "close among others": framed(b"Connection: x, close,y\r\n"),
    "close of two": framed(b"Connection: keep-alive\r\nConnection: close\r\n"),
    "close and keep-alive": framed(b"Connection: close, keep-alive\r\n"),
    "close with a body": framed(b"Connection: close\r\nContent-Length: 5\r\n", b"hello"),
    "close with an announced body": framed(b"Connection: close\r\nContent-Length: 500\r\n"),
    "close and HEAD": get(7, HOST + b"Connection: close\r\n", b"HEAD"),
    "1.0": get(version=b"HTTP/1.0"),
    "1.0 without Host": get(7, b"", version=b"HTTP/1.0"),
    "1.0 and close": get(7, b"Connection: close\r\n", version=b"HTTP/1.0"),
    "1.0 and both": get(7, b"Connection: keep-alive, close\r\n", version=b"HTTP/1.0"),
    "1.0 and both apart": get(7, b"Connection: close\r\nConnection: keep-alive\r\n", version=b"HTTP/1.0"),
    "1.0 with a body": get(7, b"Content-Length: 5\r\n", version=b"HTTP/1.0") + b"hello",
    "1.0 HEAD": get(7, b"", b"HEAD", b"HTTP/1.0"),
}


STREAMS = {
    "one": get(),
    "several": get(1) + get(22) + get(333) + get(b"x"),
    "good and bad": get(1)
    + line(b"GET / HTTP/1.1")
    + get(b"x")
    + get(5, b"X: y\r\nHost: b\r\n")
    + get(6, method=b"POST"),
    "to the end": get(1) + get(2) + get(3, HOST + b"Connection: close\r\n") + NEXT,
    "malformed": get(1) + get(2) + get(3, HOST + b"X : y\r\n") + NEXT,
    "no Host": get(1) + get(2, b"") + NEXT,
    "chunked, then GET": chunked(b"5;x=y\r\nhello\r\n1A\r\n%b\r\n0\r\nX: y\r\n\r\n" % (b"\r\n\r\n" * 6 + b"\r\n"))
    + get(2),
    "length, then GET": framed(b"Content-Length: 11\r\n", b"GET / HTTP/") + get(2),
    "HEAD, then GET": get(7, method=b"HEAD") + get(2) + get(b"x", method=b"HEAD"),
    "1.0": get(7, b"Connection: keep-alive\r\n", version=b"HTTP/1.0") + get(8, b"", version=b"HTTP/1.0") + NEXT,
    "CRLF ahead": b"\r\n\r\n" + get(1) + b"\r\n" + get(2),
    "unknown method": get(1) + get(2, method=b"BREW") + NEXT,
    "Upgrade": framed(b"Connection: Upgrade\r\nUpgrade: h2c\r\n") + get(2),
    "garbage": b"\x16\x03\x01\0\xa5\x01\0\0\xa1\x03\x03 HTTP/1.1\r\n\r\n",
}


EXPECT = b"Expect: 100-continue\r\n"
EXPECTING = framed(EXPECT + b"Content-Length: 5\r\n")
