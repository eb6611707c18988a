"""The fuzz itself: a good corpus, an oracle that sees, a short run."""

import json

import pytest
from cryptography import x509

from tests.fuzz import der, identity, oracle, seeds
from ztserve.identity import peer, spiffe_id, verify_peer

BUNDLES = {f"{name}.example": [seeds.authority(name)] for name in "ab"}
CHAINS = sorted(seeds.CORPUS.glob("*.chain"))
pytestmark = pytest.mark.filterwarnings("ignore:Parsed a serial number")


def split(path):
    return [node.der for node in der.parse(path.read_bytes())]


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_every_chain_of_the_corpus_is_good_and_whole(path):
    chain = split(path)
    assert b"".join(chain) == path.read_bytes()
    assert not oracle.why_not_a_peer(chain, BUNDLES, seeds.NOW)
    assert verify_peer(chain, BUNDLES, now=seeds.NOW).id in (
        seeds.ID,
        "spiffe://b.example/z",
    )


@pytest.mark.slow
def test_the_corpus_is_what_its_maker_makes():
    made = seeds.chains()
    assert {path.stem for path in CHAINS} == set(made)
    for name, chain in made.items():
        if name != "rsa":  # a new key each time
            assert (seeds.CORPUS / f"{name}.chain").read_bytes() == b"".join(chain)
    assert json.loads((seeds.CORPUS / "ids.json").read_text()) == list(seeds.IDS)


NAMES, CONSTRAINTS, USAGE, EXTENDED = seeds.leaf_extensions()
TWO = x509.SubjectAlternativeName([*NAMES[0], *NAMES[0]])
FORBIDDEN = {
    "X1": ((TWO, False), CONSTRAINTS, USAGE),
    "X2": seeds.signer_extensions(seeds.ID),
    "X3": (NAMES, (seeds.key_usage("digital_signature", "crl_sign"), True)),
    "X4": (NAMES, (seeds.key_usage(), True)),
    "X5": (NAMES, CONSTRAINTS, (USAGE[0], False)),
    "X6": seeds.leaf_extensions("spiffe://a.example"),
    "X7": seeds.leaf_extensions("spiffe://b.example/z"),
    "X8": (NAMES, USAGE, (x509.ExtendedKeyUsage([*EXTENDED[0]][:1]), False)),
    "": (NAMES, CONSTRAINTS, USAGE, EXTENDED),
}


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_the_oracle_sees_what_is_forbidden(rule):
    chain = [seeds.certificate("y", "a", *FORBIDDEN[rule])]
    why = oracle.why_not_a_peer(chain, BUNDLES, seeds.NOW)
    assert why.startswith(rule) if rule else not why


def test_the_oracle_sees_a_false_signature_and_a_signer_that_is_none():
    leaf, between = split(seeds.CORPUS / "between.chain")
    forged = leaf[:-1] + bytes((leaf[-1] ^ 1,))
    assert "X7" in oracle.why_not_a_peer([forged, between], BUNDLES, seeds.NOW)
    assert "X7" in oracle.why_not_a_peer([leaf], BUNDLES, seeds.NOW)
    assert "X9" in oracle.why_not_a_signer(leaf)
    assert not oracle.why_not_a_signer(between)


@pytest.mark.slow
def test_a_short_run_finds_nothing():
    tally = identity.run(4000, seed=1)
    assert tally.findings == []
    assert tally.inputs.total() == 4000
    assert min(tally.accepted[kind] for kind in tally.inputs) > 0


def believe_a_newline(text):
    if not text.startswith("spiffe://"):
        raise spiffe_id.IdentityError("no SPIFFE ID")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "control", "without"),
    [
        (peer, "_check_leaf_usage", lambda who, extensions: None),
        (peer, "as_datetime", lambda _: None),
        (spiffe_id, "_check", believe_a_newline),
    ],
    ids=["a control is gone", "a mistake hidden by a refusal", "an ID too many"],
)
def test_a_short_run_finds_what_is_broken(module, control, without, monkeypatch):
    monkeypatch.setattr(module, control, without)
    assert identity.run(4000, seed=1).findings
