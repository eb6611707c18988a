import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztserve.errors import IdentityError
from ztserve.identity import SpiffeId, spiffe_id
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


# --- the rules of the SPIFFE-ID standard, by their numbers in docs/conformance ------


def assert_refused(text, message):
    with pytest.raises(IdentityError, match=message):
        SpiffeId.parse(text)


@pytest.mark.parametrize(
    "text", ["", "http://td/a", "spiffe:/td/a", " spiffe://td/a", "SPIFFE://td/a"]
)
def test_i1_the_scheme_is_spiffe(text):
    assert_refused(text, "must begin with spiffe://")


@pytest.mark.parametrize("text", ["spiffe://", "spiffe:///a"])
def test_i2_the_trust_domain_is_not_empty(text):
    assert_refused(text, "trust domain is missing")


@pytest.mark.parametrize("text", ["spiffe://user@td/a", "spiffe://td:8443/a"])
def test_i3_a_trust_domain_has_no_user_and_no_port(text):
    assert_refused(text, "no user, port")


@pytest.mark.parametrize(
    "text", ["spiffe://TD/a", "spiffe://td\xe9/a", "spiffe://t d/a"]
)
def test_i4_a_trust_domain_has_lower_case_letters_digits_and_three_signs(text):
    assert_refused(text, "only lower-case letters")
    assert SpiffeId.parse("spiffe://a0.b-c_d/a").trust_domain == "a0.b-c_d"


def test_i4_paths_differ_by_case():
    assert SpiffeId.parse("spiffe://td/A") != SpiffeId.parse("spiffe://td/a")


@pytest.mark.parametrize("text", ["spiffe://t%64/a", "spiffe://td/a%2fb"])
def test_i5_nothing_is_percent_encoded(text):
    assert_refused(text, "percent-encoding")


@pytest.mark.parametrize(
    "text", ["spiffe://td?x=y", "spiffe://td/a?b", "spiffe://td#a"]
)
def test_i6_there_is_no_query_and_no_fragment(text):
    assert_refused(text, "query")


def test_i6_there_is_no_fragment_in_a_path():
    assert_refused("spiffe://td/a#b", "fragment")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spiffe://td//a", "empty path segment"),
        ("spiffe://td/./a", "'.' and '..'"),
        ("spiffe://td/a/..", "'.' and '..'"),
        ("spiffe://td/a/../b", "'.' and '..'"),
    ],
)
def test_i7_no_segment_is_empty_or_made_of_dots(text, message):
    assert_refused(text, message)
    assert SpiffeId.parse("spiffe://td/.../a..").path == "/.../a.."


@pytest.mark.parametrize("text", ["spiffe://td/", "spiffe://td/a/"])
def test_i8_there_is_no_trailing_slash(text):
    assert_refused(text, "trailing slash")


@pytest.mark.parametrize(
    "text", ["spiffe://td/a b", "spiffe://td/\xe4", "spiffe://td/a:b"]
)
def test_i9_a_path_has_letters_digits_and_three_signs(text):
    assert_refused(text, "only letters")
    assert SpiffeId.parse("spiffe://td/aZ0.b-c_d").path == "/aZ0.b-c_d"


def test_i10_2048_bytes_are_supported_and_no_more():
    assert len(SpiffeId.parse(LONGEST)) == 2048
    assert_refused(LONGEST + "a", "longer than 2048 bytes")


def test_i10_a_trust_domain_has_255_bytes_at_most():
    assert SpiffeId.parse("spiffe://" + "a" * 255).trust_domain == "a" * 255
    assert_refused("spiffe://" + "a" * 256 + "/x", "longer than 255 bytes")


@pytest.mark.parametrize("name", ["10.0.0.1", "1.2.3", "999.999.999.999"])
def test_i11_a_trust_domain_like_an_address_is_as_any_other(name):
    assert SpiffeId.parse(f"spiffe://{name}/x").trust_domain == name


def test_i11_an_address_with_other_signs_is_none():
    assert_refused("spiffe://[::1]/a", "only lower-case letters")


@pytest.mark.parametrize(
    "text",
    ["spiffe://td/a\n", "spiffe://td/a\0", "spiffe://td/a\r\n", "spiffe://td/a\x7f"],
)
def test_i12_a_path_has_no_control_character(text):
    assert_refused(text, "control character")


@pytest.mark.parametrize(
    "text", ["spiffe://td\n/a", "spiffe://td\n", "spiffe://t\0d/a"]
)
def test_i12_a_trust_domain_has_no_control_character(text):
    assert_refused(text, "only lower-case letters")


def test_i12_a_newline_would_pass_where_the_end_is_a_dollar():
    # Why the whole text must match: `$` also matches before a trailing newline.
    assert re.match(r"spiffe://[a-z]+/[a-z]+$", "spiffe://td/a\n")


# --- what is not of the standard ------------------------------------------------


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
    assert len(text) <= 2048
    assert text.isascii()
    assert text.isprintable()
    assert not {"", ".", ".."} & set(parsed.path.split("/")[1:])
    assert parsed.trust_domain == parsed.trust_domain.lower() != ""


def rules_one_by_one(text, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(spiffe_id, "_CANONICAL", re.compile("(?!)"))
        try:
            return SpiffeId.parse(text)
        except IdentityError:
            return None


@pytest.mark.parametrize(
    "tail", ["", "/a", "/a/b", "/.", "/..", "/...", "/a/.", "/./a"]
)
@pytest.mark.parametrize("end", ["", "/", "\n", "x", "."])
@pytest.mark.parametrize("name", ["td", "..", "", "T", "a" * 255, "a" * 256])
def test_the_rules_in_one_look_are_the_rules_one_by_one(name, tail, end, monkeypatch):
    text = f"spiffe://{name}{tail}{end}"
    try:
        looked_at = SpiffeId.parse(text)
    except IdentityError:
        looked_at = None
    assert looked_at == rules_one_by_one(text, monkeypatch)
