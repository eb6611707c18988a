import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztserve.errors import IdentityError
from ztserve.identity import SpiffeId
from ztserve.identity.spiffe_id import trust_domain_name, workload_id

LONGEST = "spiffe://td/" + "a" * (2048 - len("spiffe://td/"))


@pytest.mark.parametrize(
    ("text", "trust_domain", "path"),
    [
        ("spiffe://td.example/ns/a/sa/b", "td.example", "/ns/a/sa/b"),
        ("spiffe://td.example", "td.example", ""),
        ("spiffe://10.0.0.1/x", "10.0.0.1", "/x"),
        ("spiffe://a_b-c.d/A.b_C-0/...", "a_b-c.d", "/A.b_C-0/..."),
        ("spiffe://" + "a" * 255 + "/x", "a" * 255, "/x"),
        (LONGEST, "td", LONGEST.removeprefix("spiffe://td")),
    ],
)
def test_a_canonical_id_is_taken_apart(text, trust_domain, path):
    parsed = SpiffeId.parse(text)
    assert (parsed, parsed.trust_domain, parsed.path) == (text, trust_domain, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with spiffe://"),
        ("http://td/a", "must begin with spiffe://"),
        ("SPIFFE://td/a", "must begin with spiffe://"),
        ("spiffe:/td/a", "must begin with spiffe://"),
        (" spiffe://td/a", "must begin with spiffe://"),
        ("spiffe://", "trust domain is missing"),
        ("spiffe:///a", "trust domain is missing"),
        ("spiffe://user@td/a", "no user, port"),
        ("spiffe://td:8443/a", "no user, port"),
        ("spiffe://TD/a", "only lower-case letters"),
        ("spiffe://t%64/a", "percent-encoding"),
        ("spiffe://td?x=y", "query"),
        ("spiffe://td\n/a", "only lower-case letters"),
        ("spiffe://tdé/a", "only lower-case letters"),
        ("spiffe://[::1]/a", "only lower-case letters"),
        ("spiffe://" + "a" * 256 + "/x", "longer than 255 bytes"),
        ("spiffe://td/a%2fb", "percent-encoding"),
        ("spiffe://td/a?b", "query"),
        ("spiffe://td/a#b", "fragment"),
        ("spiffe://td/", "trailing slash"),
        ("spiffe://td/a/", "trailing slash"),
        ("spiffe://td//a", "empty path segment"),
        ("spiffe://td/./a", "'.' and '..'"),
        ("spiffe://td/a/..", "'.' and '..'"),
        ("spiffe://td/a\n", "control character"),
        ("spiffe://td/a\0", "control character"),
        ("spiffe://td/a b", "only letters"),
        ("spiffe://td/ä", "only letters"),
        (LONGEST + "a", "longer than 2048 bytes"),
    ],
)
def test_what_is_no_spiffe_id_is_refused_with_the_reason(text, message):
    with pytest.raises(IdentityError, match=message):
        SpiffeId.parse(text)


@pytest.mark.parametrize("thing", [None, 7, b"spiffe://td/a"])
def test_what_is_no_text_is_refused(thing):
    with pytest.raises(IdentityError, match="must be text"):
        SpiffeId.parse(thing)


def test_an_invalid_id_can_be_made_in_no_way():
    with pytest.raises(IdentityError):
        SpiffeId("spiffe://td/a/")
    good = SpiffeId("spiffe://td/a")
    assert type(pickle.loads(pickle.dumps(good))) is SpiffeId
    with pytest.raises(IdentityError):
        pickle.loads(pickle.dumps(good).replace(b"spiffe://td/a", b"spiffe://td//"))


def test_a_long_wrong_id_is_shown_shortened():
    with pytest.raises(IdentityError) as caught:
        SpiffeId.parse("x" * 100_000)
    assert len(str(caught.value)) < 200


def test_a_workload_needs_a_path_and_a_trust_domain_has_none():
    assert workload_id("spiffe://td/a") == "spiffe://td/a"
    with pytest.raises(IdentityError, match="a workload's ID needs a path"):
        workload_id("spiffe://td")
    assert trust_domain_name("td.example") == "td.example"
    for wrong in ("td/a", "spiffe://td", "", "TD"):
        with pytest.raises(IdentityError):
            trust_domain_name(wrong)


def test_an_id_is_a_string_and_shows_itself():
    parsed = SpiffeId.parse("spiffe://td/a")
    assert {parsed: 1}["spiffe://td/a"] == 1
    assert repr(parsed) == "SpiffeId('spiffe://td/a')"


PIECES = st.lists(
    st.sampled_from(
        [
            "spiffe",
            "://",
            "/",
            ".",
            "..",
            "td",
            "a",
            "A",
            "%2e",
            "@",
            ":",
            "?",
            "\n",
            "é",
        ]
    ),
    max_size=12,
).map("".join)


@pytest.mark.slow
@given(PIECES | PIECES.map("spiffe://td/".__add__) | st.text())
def test_any_text_is_a_strict_id_or_an_identity_error(text):
    try:
        parsed = SpiffeId.parse(text)
    except IdentityError:
        return
    assert f"spiffe://{parsed.trust_domain}{parsed.path}" == text
    assert text.isascii()
    assert text.isprintable()
    assert not {"", ".", ".."} & set(parsed.path.split("/")[1:])
    assert parsed.trust_domain == parsed.trust_domain.lower() != ""
