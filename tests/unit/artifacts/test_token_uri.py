"""PKCS#11 URIs: RFC 7512's grammar, and what is left out of it on purpose."""

from pathlib import Path

import pytest

from ztserve.artifacts.publish import TokenUri
from ztserve.errors import ConfigError

MODULE = "module-path=/usr/lib/softhsm/libsofthsm2.so"
GOOD = f"pkcs11:token=signing;object=trainer?{MODULE}"


def test_a_uri_names_a_key_a_token_and_a_module():
    uri = TokenUri.parse(
        "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,"
        "%20Inc.;model=1.0;serial=0123;object=my-certificate;type=private;id=%69%95%3E"
        f"%5C?{MODULE}&pin-source=file:/etc/token_pin"
    )
    assert uri.token == {
        "token": "The Software PKCS#11 Softtoken",
        "manufacturer": "Snake Oil, Inc.",
        "model": "1.0",
        "serial": "0123",
    }
    assert (uri.label, uri.id) == ("my-certificate", b"\x69\x95\x3e\x5c")
    assert uri.module == Path("/usr/lib/softhsm/libsofthsm2.so")
    assert uri.pin_source == Path("/etc/token_pin")
    assert str(uri).startswith("the key object=my-certificate, id=69953e5c of the ")


def test_the_order_of_attributes_is_free():
    turned = TokenUri.parse(f"pkcs11:object=trainer;token=signing?{MODULE}")
    assert turned == TokenUri.parse(GOOD)


@pytest.mark.parametrize("source", ["file:/p", "file:///p"])
def test_a_pin_comes_from_a_file(source):
    assert TokenUri.parse(f"{GOOD}&pin-source={source}").pin_source == Path("/p")


@pytest.mark.parametrize("label", ["a:[]@!$'()*+,=&b", "Zo%C3%ab", "%25%3b%3F"])
def test_a_value_has_any_characters_that_the_grammar_has(label):
    uri = TokenUri.parse(GOOD.replace("trainer", label))
    assert uri.label in {"a:[]@!$'()*+,=&b", "Zoë", "%;?"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pkcs11:", "PKCS11:", "begins with pkcs11:"),
        ("signing", "", "the value of token is empty"),
        ("signing", "a b", "characters that must be written as %XX"),
        ("signing", "a%2", "characters that must be written as %XX"),
        ("signing", "a%zz", "characters that must be written as %XX"),
        ("signing", "a/b", "characters that must be written as %XX"),
        ("signing", "a|b", "characters that must be written as %XX"),
        ("signing", "zoë", "characters that must be written as %XX"),
        ("signing", "a\n", "characters that must be written as %XX"),
        ("signing", "a%0a", "token has control characters"),
        ("signing", "a%ff", "token is not UTF-8"),
        ("object=trainer", "object", "the value of object is empty"),
        ("object=trainer", "", "'' is not understood here"),
        ("object=", "Object=", "'Object' is not understood here"),
        ("object=", "x-vendor=1;object=", "'x-vendor' is not understood here"),
        ("object=", "slot-id=0;object=", "'slot-id' is not understood here"),
        ("object=", "token=other;object=", "token is there twice"),
        ("object=trainer", "type=private", "it names no key; add object=LABEL"),
        ("token=signing;", "", "it names no token; add one of token, manufacturer"),
        ("?", ";type=public?", "only type=private signs"),
        ("?", ";type=secret-key?", "only type=private signs"),
        (f"?{MODULE}", "", r"add \?module-path=.*; quote the URI: to a shell"),
        ("=/usr", "=usr", "module-path must be absolute"),
        ("module-path", "module-name", "'module-name' is not understood here"),
        ("?", f"?{MODULE}&", "module-path is there twice"),
        ("?", "?pin-source=|cat /pin&", "the value of pin-source is empty, or has"),
        ("?", "?pin-source=|/bin/pin&", "pin-source must be file:/path"),
        ("?", "?pin-source=/pin&", "pin-source must be file:/path"),
        ("?", "?pin-source=file:pin&", "pin-source must be file:/path"),
        ("?", "?pin-source=file://host/pin&", "pin-source must be file:/path"),
        ("?", "?pin-source=file:////pin&", "pin-source must be file:/path"),
        ("?", "?pin-source=https://host/pin&", "pin-source must be file:/path"),
        ("trainer", "x" * 2048, "the limit is 2048"),
    ],
)
def test_what_is_no_uri_of_a_signing_key_is_refused(old, new, message):
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(ConfigError, match=message):
        TokenUri.parse(text)


@pytest.mark.parametrize("where", ["?pin-value={}&", ";pin-value={}?"])
def test_a_pin_in_the_uri_is_refused_and_not_repeated(where):
    text = GOOD.replace("?", where.format("736563726574"), 1)
    with pytest.raises(ConfigError, match="would show the PIN to every proc") as caught:
        TokenUri.parse(text)
    assert "736563726574" not in str(caught.value)
