"""Who may place a library, or a public key, where a token's owner signs."""

import shutil

import pytest

from tests.unit.artifacts.softhsm import nobody, soft_hsm
from ztserve.artifacts.publish import TokenKey, TokenUri, tokens
from ztserve.artifacts.statements.envelope import check_signature, parse_envelope
from ztserve.errors import ConfigError, VerificationError

pytestmark = pytest.mark.slow
TEXT = "text/plain"


@pytest.fixture
def hsm():
    return soft_hsm()


def signs(key):
    envelope = parse_envelope(
        key.envelope(b"told", payload_type=TEXT), what="it", payload_type=TEXT
    )
    check_signature(envelope, key.public)
    return True


@pytest.mark.parametrize("which", ["the file", "its folder"])
@pytest.mark.parametrize("checked", [True, False], ids=["refused", "without the check"])
def test_a_module_that_others_may_write_is_not_loaded(
    hsm, tmp_path, monkeypatch, checked, which
):
    """Its code would run where the PIN is typed."""
    folder = tmp_path / "lib"
    folder.mkdir(0o755)
    module = folder / f"{which.split()[1]}-{checked}.so"
    shutil.copy(hsm.module, module)
    (module if which == "the file" else folder).chmod(0o777)
    uri = TokenUri.parse(hsm.uri("trainer").replace(str(hsm.module), str(module)))
    if checked:
        with pytest.raises(ConfigError, match="whoever can write it runs code where"):
            TokenKey(uri, nobody)
    else:
        monkeypatch.setattr(tokens, "check_module", lambda module: None)
        assert signs(TokenKey(uri, nobody))


@pytest.mark.parametrize("checked", [True, False], ids=["refused", "without the check"])
def test_a_public_key_that_is_not_the_private_ones_signs_nothing(
    hsm, monkeypatch, checked
):
    """Else the bundle would name a stranger's key, and nobody could verify it."""
    key = hsm.key("mismatched")
    if checked:
        with pytest.raises(VerificationError, match="the two are no pair"):
            key.envelope(b"told")
    else:
        monkeypatch.setattr(tokens, "check_held", lambda *_: None)
        assert key.id == hsm.key("another").id
        with pytest.raises(VerificationError, match="the signature does not hold"):
            signs(key)
