"""A token in software (SoftHSM 2), where this machine has it: else a skip, aloud."""

import atexit
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.unit.artifacts.real import program
from ztserve.artifacts.publish import TokenKey, TokenUri

PIN = "correct-horse-7"
CURVES = {"trainer": "secp256r1", "deployer": "secp384r1", "evaluator": "secp521r1"}


@dataclass(frozen=True)
class SoftHsm:
    """Its module, and a file that holds the PIN of its tokens."""

    module: Path
    pin: Path

    def uri(self, key, *, token="signing", pin=None, **path):
        """Return the URI of a key by its label, or by the attributes in `path`."""
        named = {"token": token, "object": key, "type": "private", **path}
        parts = [f"{k}={quote(v, safe='')}" for k, v in named.items() if v is not None]
        query = f"module-path={self.module}&pin-source=file:{pin or self.pin}"
        return f"pkcs11:{';'.join(parts)}?{query}"

    def key(self, label, **named):
        """Open a key as the command line would, with nobody there to be asked."""
        return TokenKey(TokenUri.parse(self.uri(label, **named)), nobody)


def nobody(what):
    raise AssertionError(f"asked for {what}")


@cache
def soft_hsm():
    """Make the tokens, once a process: the library reads its configuration once."""
    util = program("softhsm2-util", "SOFTHSM2_UTIL")
    module = Path(util).parents[1] / "lib/softhsm/libsofthsm2.so"
    if not module.exists():
        pytest.skip(f"{module} is not installed (Debian: libsofthsm2)")
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    module = module.resolve()  # as we load it: one library, one state
    folder = Path(tempfile.mkdtemp(prefix="ztserve-softhsm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}/tokens\n")
    os.environ["SOFTHSM2_CONF"] = str(folder / "softhsm2.conf")
    pin = folder / "pin"
    pin.write_text(PIN + "\n")
    pin.chmod(0o600)
    for label in ("signing", "double", "double"):
        _make_token([util, "--module", module], label)
    _make_keys(str(module))
    return SoftHsm(module, pin)


def _make_token(util, label):
    words = ["--init-token", "--free", "--label", label]
    command = [*util, *words, "--pin", PIN, "--so-pin", "of-the-officer"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)


def _make_keys(module):
    import pkcs11

    token = pkcs11.lib(module).get_token(token_label="signing")
    with token.open(rw=True, user_pin=PIN) as session:
        make = Maker(session)
        for number, (label, curve) in enumerate(CURVES.items(), 1):
            make.pair(label, number, curve)
        make.pair("twin", 4)
        make.pair("twin", 5)
        make.pair("koblitz", 6, "secp256k1")
        make.pair("silent", 7, sign=False)
        make.pair("careful", 8, always_authenticate=True)
        make.pair("lonely", 9)[0].destroy()
        make.pair("mismatched", 10)[0].destroy()
        make.public_twin("mismatched", 10, make.pair("another", 11)[0])
        session.generate_keypair(
            pkcs11.KeyType.RSA, 2048, id=b"\x0c", label="rsa", store=True
        )


class Maker:
    """Makes pairs of keys in a session."""

    def __init__(self, session):
        self._session = session

    def pair(self, label, number, curve="secp256r1", **private):
        import pkcs11
        from pkcs11.util.ec import encode_named_curve_parameters

        attribute = pkcs11.Attribute
        params = encode_named_curve_parameters(curve)
        domain = self._session.create_domain_parameters(
            pkcs11.KeyType.EC, {attribute.EC_PARAMS: params}, local=True
        )
        template = {attribute[name.upper()]: value for name, value in private.items()}
        return domain.generate_keypair(
            id=bytes([number]),
            label=label,
            store=True,
            mechanism=pkcs11.Mechanism.EC_KEY_PAIR_GEN,
            private_template=template,
        )

    def public_twin(self, label, number, other):
        """Put the public half of another key where that of this one belongs."""
        import pkcs11

        attribute = pkcs11.Attribute
        taken = (attribute.EC_PARAMS, attribute.EC_POINT)
        self._session.create_object(
            {
                attribute.CLASS: pkcs11.ObjectClass.PUBLIC_KEY,
                attribute.KEY_TYPE: pkcs11.KeyType.EC,
                attribute.TOKEN: True,
                attribute.ID: bytes([number]),
                attribute.LABEL: label,
                **{name: other[name] for name in taken},
            }
        )
