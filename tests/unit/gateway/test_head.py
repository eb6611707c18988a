import string

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztserve.gateway.head import Malformed, read_head

POST = b"POST /v1/predict HTTP/1.1\r\nHost: gateway\r\n"
BODY = b"Content-Type: application/json\r\nContent-Length: 2\r\n"


def read(head: bytes, **limits):
    limits = {"max_headers": 64, "max_body_bytes": 100, **limits}
    return read_head(head.removesuffix(b"\r\n"), **limits)


def refused(head: bytes, **limits) -> tuple[int, str]:
    with pytest.raises(Malformed) as caught:
        read(head, **limits)
    return caught.value.status, caught.value.public


def test_a_request_is_read():
    head = read(POST + BODY + b"X-Team:  blue \r\nx-team: red\r\n")
    assert (head.method, head.path, head.host) == ("POST", "/v1/predict", "gateway")
    assert (head.length, head.expects, head.closes) == (2, False, False)
    assert head.headers["x-team"] == "blue,red"
    assert head.dropped == ()


def test_a_get_needs_no_body():
    head = read(
        b"GET /v2/health/live HTTP/1.1\r\nHost: g:8443\r\nConnection: Close\r\n"
    )
    assert (head.length, head.closes) == (0, True)


def test_expect_continue_is_understood():
    assert read(POST + BODY + b"Expect: 100-Continue\r\n").expects


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "Cookie",
        "Forwarded",
        "Proxy-Authorization",
        "SSL-Client-Verify",
        "Via",
        "X-Client-Cert",
        "X-Envoy-External-Address",
        "X-Forwarded-Client-Cert",
        "X-Forwarded-For",
        "X-HTTP-Method-Override",
        "X-Original-URL",
        "X-Real-IP",
        "ZT-Caller-Bin",
        "zt-anything",
    ],
)
def test_a_header_that_says_who_somebody_is_is_dropped_and_noted(name):
    head = read(POST + BODY + f"{name}: x\r\n".encode())
    assert head.dropped == (name.lower(),)
    assert name.lower() not in head.headers


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET /v2 HTTP/1.0", 505),
        (b"GET /v2 HTTP/2.0", 505),
        (b"GET /v2", 400),
        (b"GET  /v2 HTTP/1.1", 400),
        (b"GET /v2 HTTP/1.1 ", 400),
        (b" GET /v2 HTTP/1.1", 400),
        (b"get /v2 HTTP/1.1", 400),
        (b"GET\t/v2 HTTP/1.1", 400),
        (b"GET /v2 http/1.1", 400),
        (b"DELETE /v2 HTTP/1.1", 405),
        (b"OPTIONS * HTTP/1.1", 405),
        (b"CONNECT a:1 HTTP/1.1", 405),
        (b"PRI * HTTP/2.0", 505),
        (b"GET https://gateway/v2 HTTP/1.1", 400),
        (b"GET //v2 HTTP/1.1", 400),
        (b"GET /v2//health HTTP/1.1", 400),
        (b"GET /v2/ HTTP/1.1", 400),
        (b"GET / HTTP/1.1", 400),
        (b"GET /v2/./x HTTP/1.1", 400),
        (b"GET /v2/../x HTTP/1.1", 400),
        (b"GET /v2/.. HTTP/1.1", 400),
        (b"GET /v2%2fhealth HTTP/1.1", 400),
        (b"GET /v2%00 HTTP/1.1", 400),
        (b"GET /v2;x HTTP/1.1", 400),
        (b"GET /v2?x=1 HTTP/1.1", 400),
        (b"GET /v2#x HTTP/1.1", 400),
        (b"GET /v2\\x HTTP/1.1", 400),
        (b"GET /v2\x00 HTTP/1.1", 400),
        (b"GET /v\xc3\xa9 HTTP/1.1", 400),
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1", 400),
    ],
)
def test_a_request_line_that_is_not_to_the_letter_is_refused(line, status):
    assert refused(line + b"\r\nHost: g\r\n")[0] == status


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"", 400),
        (b"Host: a\r\nHost: a\r\n", 400),
        (b"Host: a b\r\n", 400),
        (b"Host: a/b\r\n", 400),
        (b"Host : a\r\n", 400),
        (b"Host: a\r\nX Y: z\r\n", 400),
        (b"Host: a\r\n folded\r\n", 400),
        (b"Host: a\r\nX: a\x00b\r\n", 400),
        (b"Host: a\r\nX: a\rb\r\n", 400),
        (b"Host: a\r\nX: a\nY: b\r\n", 400),
        (b"Host: a\r\nX: \xff\r\n", 400),
        (b"Host: a\r\n: b\r\n", 400),
        (b"Host: a\r\nnothing\r\n", 400),
        (b"Host: a\r\nContent-Length: 3\r\n", 400),
        (b"Host: a\r\nUpgrade: h2c\r\n", 400),
        (b"Host: a\r\nExpect: more\r\n", 417),
        (b"Host: a\r\n" + b"X: y\r\n" * 70, 431),
    ],
)
def test_header_fields_that_are_not_to_the_letter_are_refused(lines, status):
    assert refused(b"GET /v2 HTTP/1.1\r\n" + lines)[0] == status


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"", 411),
        (b"Transfer-Encoding: chunked\r\n", 411),
        (b"Transfer-Encoding: gzip, chunked\r\n", 411),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n", 400),
        (b"Content-Length: 2\r\nTransfer-Encoding: \r\n", 400),
        (b"Content-Length: 2\r\nContent-Length: 2\r\n", 400),
        (b"Content-Length: 2\r\nContent-Length: 3\r\n", 400),
        (b"Content-Length: 2, 2\r\n", 400),
        (b"Content-Length: +2\r\n", 400),
        (b"Content-Length: -2\r\n", 400),
        (b"Content-Length: 0x2\r\n", 400),
        (b"Content-Length: 2_0\r\n", 400),
        (b"Content-Length: \xb2\r\n", 400),
        (b"Content-Length:\r\n", 400),
        (b"Content-Length: 99999999999999999999\r\n", 400),
        (b"Content-Length: 101\r\n", 413),
    ],
)
def test_a_body_has_one_framing_and_a_bound(lines, status):
    typed = b"Content-Type: application/json\r\n"
    assert refused(POST + typed + lines)[0] == status


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"Content-Type: text/plain\r\n",
        b"Content-Type: application/x-www-form-urlencoded\r\n",
        b"Content-Type: application/json; charset=latin-1\r\n",
        b"Content-Type: application/json\r\nContent-Encoding: gzip\r\n",
        b"Content-Type: application/json\r\nInference-Header-Content-Length: 1\r\n",
    ],
)
def test_what_is_not_plain_json_is_refused(lines):
    assert refused(POST + b"Content-Length: 2\r\n" + lines)[0] == 415


def test_json_may_name_its_charset():
    kind = b'Content-Type: application/json; charset="UTF-8"\r\n'
    assert read(POST + b"Content-Length: 2\r\n" + kind).length == 2


class Oracle:
    """What another strict parser makes of the same bytes."""

    def __init__(self, data: bytes) -> None:
        self.url, self.headers, self.body, self.messages = b"", [], b"", 0
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower().decode(), value.decode().strip()))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.messages += 1


_TOKENS = st.text(string.ascii_letters + "-", min_size=1, max_size=12)
_VALUES = st.text(string.printable + "\x00\x7f\xe9", max_size=24)
_NAMES = st.one_of(
    _TOKENS,
    st.sampled_from(["Content-Length", "Transfer-Encoding", "Host", "Connection", "X"]),
    st.text(string.printable, max_size=6),
)
_NUMBERS = st.sampled_from(["0", "5", " 5", "+5", "5,5", "chunked", "close", "g"])
_ENDS = st.sampled_from(["\r\n"] * 8 + ["\n", "\r", " \r\n"])


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(["POST", "GET", "post", "PUT"]),
    st.one_of(st.just("/v1/predict"), st.text(string.printable, max_size=10)),
    st.lists(st.tuples(_NAMES, st.one_of(_VALUES, _NUMBERS), _ENDS), max_size=4),
)
def test_what_is_accepted_means_the_same_to_another_parser(method, path, fields):
    base = "Host: g\r\nContent-Type: application/json\r\n"
    base += "Content-Length: 5\r\n" if method == "POST" else ""
    more = "".join(f"{name}: {value}{end}" for name, value, end in fields)
    head = f"{method} {path} HTTP/1.1\r\n{base}{more}".encode("latin-1")
    if b"\r\n\r\n" in head:
        return
    try:
        ours = read(head)
    except Malformed:
        return
    other = Oracle(head.removesuffix(b"\r\n") + b"\r\n\r\n" + b"12345"[: ours.length])
    assert other.url.decode() == ours.path
    assert other.parser.get_method().decode() == ours.method
    assert (other.messages, len(other.body)) == (1, ours.length)
    assert {name for name, _ in other.headers} == {*ours.headers, *ours.dropped}
    for name, value in ours.headers.items():
        found = [v for n, v in other.headers if n == name]
        assert ",".join(found) == value
