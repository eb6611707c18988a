"""Istio's matching rules, mostly as its own tests and documentation state them."""

import pytest

from ztserve.authorization import match
from ztserve.authorization.document import read
from ztserve.errors import ConfigError


def nodes(*values: str):
    text = "".join(f"- {value!r}\n" for value in values)
    (document,) = read(text, "x")
    return document.sequence()


@pytest.mark.parametrize(
    ("value", "matching", "other"),
    [
        ("/info", ["/info"], ["/info/", "/Info", "/inf", "", "/info?x"]),
        ("/info*", ["/info", "/info/x", "/information"], ["/inf", "", "x/info"]),
        ("*/info", ["/info", "/a/info", "x/info"], ["info", "/info/", ""]),
        ("*", ["a", "*", "/"], [""]),
        ("a*b", ["a*b"], ["ab", "axb"]),
        ("*a*", ["a*", "xa*"], ["a", "xax"]),
    ],
)
def test_strings_match_exactly_by_prefix_suffix_or_presence(value, matching, other):
    test = match.strings([value])
    assert all(map(test, matching))
    assert not any(map(test, other))


def test_values_are_alternatives():
    test = match.strings(["a", "b*", "*c"])
    assert all(map(test, ["a", "bx", "xc"]))
    assert not test("x")


def test_a_suffix_does_not_reach_into_the_prefix():
    test = match.strings(["*://b"], prefix="spiffe://")
    assert not test("spiffe://b")
    assert test("spiffe://a://b")


def test_host_names_match_whatever_the_case():
    test = match.caseless(["Example.com", "*.INTERNAL"])
    assert all(map(test, ["EXAMPLE.COM", "example.com", "a.internal"]))
    assert not test("example.com:8443")


@pytest.mark.parametrize(
    ("template", "path", "expected"),
    [
        ("/foo/{*}", "/foo/bar", True),
        ("/foo/{*}", "/foo/bar/baz", False),
        ("/foo/{*}", "/foo/", False),
        ("/foo/{*}", "/foo", False),
        ("/foo/{**}", "/foo/bar", True),
        ("/foo/{**}", "/foo/", True),
        ("/foo/{**}", "/foo", False),
        ("/foo/{**}/", "/foo/bar/", True),
        ("/foo/{**}/", "/foo//", True),
        ("/foo/{**}/", "/foo/bar", False),
        ("/foo/{*}/bar/{**}", "/foo/buzz/bar/", True),
        ("/foo/{*}/bar/{**}", "/foo/buzz/bar/baz", True),
        ("/foo/{*}/bar/{**}", "/foo/buzz/bar", False),
        ("/foo/{*}/bar/{**}", "/foo//bar/x", False),
        ("/foo/{*}/bar/{**}", "/foo/a/b/bar/x", False),
        ("/allow/admin/{**}", "/allow/admin/", True),
        ("/allow/admin/{**}", "/allow/admin/a/b.txt", True),
        ("/allow/admin/{**}", "/allow/admin", False),
        ("/allow/admin/{**}", "/allow/administrator", False),
        ("/store/{**}/cart", "/store//cart", True),
        ("/store/{**}/cart", "/store/a/b/cart", True),
        ("/store/{**}/cart", "/store/cart", False),
        ("/store/{**}/cart", "/store/a/cart/x", False),
        ("/{*}/foo", "/a%20b/foo", True),
        ("/{*}/foo", "/a\nb/foo", False),
        ("/{*}/a.b", "/x/aXb", False),
    ],
)
def test_path_templates(template, path, expected):
    assert match.paths(nodes(template))(path) is expected


@pytest.mark.parametrize(
    "template",
    [
        "/foo/{**}buzz/bar",
        "/{*}/foo/{}/bar",
        "/foo/{*}/bar/*",
        "/foo/{*}/bar/**/buzz",
        "/foo/{buzz}/bar",
        "/{buzz}",
        "/foo/{buzz}/bar/{**}",
        "/foo/{buzz=*}/bar/{**}",
        "/{*}/foo/{buzz=**}/bar",
        "/{*}/foo/{**}bar",
        "/{*}/foo/{*}.txt",
        "/{*}/foo/{temp",
        "/{*}/foo/temp}/bar",
        "/{*}/foo/temp}/*",
        "/foo/temp}/bar",
        "/{**}/foo/temp/{*}/bar",
        "/{**}/{**}",
        "/{**}/foo/temp/{**}/bar",
        "/{*}/foo/?abc",
        "/*/baz/{*}",
        "/**/baz/{*}",
        "/{**}/foo/{*}",
        "/{*}//foo",
    ],
)
def test_templates_that_istio_refuses_are_refused(template):
    with pytest.raises(ConfigError):
        match.paths(nodes(template))


@pytest.mark.parametrize(
    "template", ["/{*}/foo", "/{*}/foo/", "/foo/{**}/bar", "/foo/bar/{**}", "{*}/x"]
)
def test_templates_that_istio_takes_are_taken(template):
    match.paths(nodes(template))


def test_namespaces_look_for_ns_anywhere_in_the_id():
    test = match.namespaces(nodes("ml-api", "dev-*"))
    assert test("spiffe://a/ns/ml-api/sa/x")
    assert test("spiffe://b/ns/dev-1/sa/x")
    assert not test("spiffe://a/ns/ml-api-2/sa/x")
    assert not test("spiffe://a/ns/ml-api")
    with pytest.raises(ConfigError, match="not a namespace"):
        match.namespaces(nodes("ml.api"))


def test_service_accounts_are_of_the_policys_namespace_unless_they_name_one():
    test = match.service_accounts(nodes("web", "other/cli"), "ml")
    assert test("spiffe://a/ns/ml/sa/web")
    assert test("spiffe://a/ns/ml/pod/1/sa/web")
    assert test("spiffe://a/ns/other/sa/cli/pod/1")
    assert not test("spiffe://a/ns/other/sa/web")
    assert not test("spiffe://a/ns/ml/sa/web-junk")


@pytest.mark.parametrize(
    "value", ["too/many/slashes", "/emptyns", "emptysa/", "ns/*", "a" * 321]
)
def test_a_service_account_of_another_form_is_refused(value):
    with pytest.raises(ConfigError, match="is not 'serviceAccount' or"):
        match.service_accounts(nodes(value), "ml")


def test_more_than_16_service_accounts_are_refused():
    with pytest.raises(ConfigError, match="at most 16"):
        match.service_accounts(nodes(*map(str, range(100, 117))), "ml")


def test_addresses_match_single_ones_and_ranges():
    test = match.addresses(nodes("10.0.0.0/8", "192.168.1.7", "2001:db8::/32"))
    assert test("10.1.2.3")
    assert test("192.168.1.7")
    assert test("2001:DB8::1")
    assert test("192.168.1.8") is False
    assert test("::ffff:10.1.2.3"), "an IPv4 address as IPv6 sockets spell it"
    assert test("") is None
    assert test("unix") is None


def test_what_is_no_address_or_port_is_refused():
    for value in ("a.b.c.d", "10.0.0.0/33", "1.2.3"):
        with pytest.raises(ConfigError, match="no IP address"):
            match.addresses(nodes(value))
    for value in ("x", "65536", "-1", "1.5"):
        with pytest.raises(ConfigError, match="not a port"):
            match.ports(nodes(value))


@pytest.mark.parametrize(
    ("value", "issuer", "subject", "expected"),
    [
        ("*", "i", "s", True),
        ("*", "i", "", False),
        ("https://i.example/s", "https://i.example", "s", True),
        ("https://i.example/s", "https://i.example/", "s", False),
        ("*/s", "anyone", "s", True),
        ("*/s", "anyone", "t", False),
        ("*.example/s", "a.example", "s", True),
        ("*.example/s", "a.test", "s", False),
        ("i/*", "i", "anyone", True),
        ("i/*", "j", "anyone", False),
        ("i/s*", "i", "s1", True),
        ("i/s*", "i", "t1", False),
        ("i/*s", "i", "xs", False),
        ("*suf", "i", "x-suf", True),
        ("*suf", "i", "suffix", False),
        ("pre*", "prefix", "anyone", True),
        ("pre*", "other", "anyone", False),
        ("i", "i", "s", False),
    ],
)
def test_request_principals(value, issuer, subject, expected):
    assert match.request_principals([value])({"iss": issuer, "sub": subject}) is (
        expected
    )


def test_request_principals_need_a_token_with_strings():
    test = match.request_principals(["*"])
    assert not test(None)
    assert not test({})
    assert not test({"iss": 1, "sub": 2})


def test_claims_match_strings_and_lists_of_strings():
    admins = match.claim(["groups"], ["admin", "ops-*"])
    assert admins({"groups": "admin"})
    assert admins({"groups": ["x", "ops-1"]})
    assert not admins({"groups": ["x", 1, True, None]})
    assert not admins({"groups": True})
    assert not admins({})
    assert not admins(None)
    assert match.claim(["a", "b"], ["x"])({"a": {"b": ["x"]}})
    assert not match.claim(["a", "b"], ["x"])({"a": "b"})
