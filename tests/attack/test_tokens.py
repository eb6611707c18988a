"""Who may place a library, or a public key, where a token's owner signs."""

import shutil
from pathlib import Path

import pytest

from tests.unit.artifacts.softhsm import nobody, soft_hsm
from ztserve.artifacts.publish import TokenKey, TokenUri, tokens
from ztserve.artifacts.statements.envelope import check_signature, parse_envelope
from ztserve.errors import ArtifactError, ConfigError, VerificationError

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


@pytest.mark.parametrize("place", ["lib/x.so", "lib", "."])
@pytest.mark.parametrize("checked", [True, False], ids=["refused", "without the check"])
def test_a_module_that_others_may_write_is_not_loaded(
    hsm, tmp_path, monkeypatch, checked, place
):
    """Its code would run where the PIN is typed. Also by a link to it."""
    (tmp_path / "lib").mkdir(0o755)
    module = tmp_path / "lib/x.so"
    shutil.copy(hsm.module, module)
    (tmp_path / "link.so").symlink_to(module)
    (tmp_path / place).chmod(0o777)
    for path in (module, tmp_path / "link.so"):
        uri = TokenUri.parse(hsm.uri("trainer").replace(str(hsm.module), str(path)))
        if checked:
            with pytest.raises(ConfigError, match="whoever can write it runs code"):
                TokenKey(uri, nobody)
        else:
            monkeypatch.setattr(tokens, "check_module", Path.resolve)
            assert signs(TokenKey(uri, nobody))


@pytest.mark.parametrize("checked", [True, False], ids=["refused", "without the check"])
def test_a_link_that_is_bent_later_leads_nowhere_else(
    hsm, tmp_path, monkeypatch, checked
):
    """The link's folder is anybody's: what was looked at is what is loaded."""
    folder = tmp_path / "anybodys"
    folder.mkdir()
    folder.chmod(0o1777)
    module, link = tmp_path / f"x{checked}.so", folder / "link.so"
    shutil.copy(hsm.module, module)
    link.symlink_to(module)
    look = tokens.check_module

    def bent_after(path):
        there = look(path)
        link.unlink()
        link.symlink_to(tmp_path / "evil.so")
        return there if checked else path

    monkeypatch.setattr(tokens, "check_module", bent_after)
    uri = TokenUri.parse(hsm.uri("trainer").replace(str(hsm.module), str(link)))
    if checked:
        assert signs(TokenKey(uri, nobody))
    else:
        with pytest.raises(ArtifactError, match=r"link.so: cannot open shared object"):
            TokenKey(uri, nobody)


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
