"""What a broker states, read strictly: each fault by name."""

import base64
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.artifacts.brokers import BROKER_ID, DOMAIN, REPLICA_ID
from ztserve.artifacts.loading.shared import statement
from ztserve.artifacts.loading.shared.memory import MemoryId
from ztserve.artifacts.loading.shared.statement import Request, Statement
from ztserve.artifacts.statements.envelope import pae
from ztserve.artifacts.statements.strict import Malformed
from ztserve.errors import Unauthenticated, VerificationError
from ztserve.testing import ThrowAwayAuthority
from ztserve.types import ModelRef

DIGEST = "sha256:" + "1" * 64
REQUEST = Request(ModelRef(f"m:1@{DIGEST}"), "2" * 64)
FILE = {"name": "a", "size": 1, "digests": ["3" * 64]}


@pytest.fixture(scope="module")
def authority():
    return ThrowAwayAuthority(DOMAIN)


@pytest.fixture(scope="module")
def svid(authority):
    return authority.issue(BROKER_ID)


@pytest.fixture(scope="module")
def identity(authority):
    return authority.source(REPLICA_ID).current()


def made():
    return Statement(
        REQUEST.nonce,
        statement.boot_id(),
        DIGEST,
        MemoryId(1, 2, 4096),
        {"a": 1, "b": 0},
        {"a": ("3" * 64,), "b": ()},
    )


def verified(message, identity, check=lambda _: None):
    return statement.verify(message, REQUEST, BROKER_ID, identity, check)


def signed(svid, **changes):
    """The message of a statement whose payload has these fields changed."""
    message = statement.sign(made(), svid)
    payload = json.loads(base64.b64decode(message["payload"])) | changes
    text = json.dumps({k: v for k, v in payload.items() if v is not ...})
    return resigned(svid, text.encode())


def resigned(svid, payload):
    signature = svid.key.sign(
        pae(statement.PAYLOAD_TYPE, payload), ec.ECDSA(hashes.SHA256())
    )
    return {
        "payload": base64.b64encode(payload).decode(),
        "signature": base64.b64encode(signature).decode(),
        "chain": [base64.b64encode(one).decode() for one in svid.chain_der],
    }


def test_what_was_signed_is_what_is_read(svid, identity):
    assert verified(statement.sign(made(), svid), identity) == made()
    assert verified(signed(svid), identity) == made()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonce": ...}, "'nonce' is missing"),
        ({"nonce": 1}, "'nonce' is of kind int"),
        ({"more": 1}, "unknown field 'more'"),
        ({"memory": {"device": 1, "inode": 2}}, "'size' is missing"),
        ({"memory": {"device": 1, "inode": 2, "size": 1.0}}, "'size' is of kind float"),
        ({"memory": [1, 2, 3]}, "'memory' is of kind list"),
        ({"files": {}}, "'files' is of kind dict"),
        ({"files": [FILE, FILE]}, "'a' is listed twice"),
        ({"files": [FILE | {"size": True}]}, "'size' is of kind bool"),
        ({"files": [FILE | {"digests": ["x"]}]}, "a digest of 'a' is none"),
        ({"files": [FILE | {"digests": [1]}]}, "a digest of 'a' is none"),
        ({"files": [FILE | {"offset": 0}]}, "unknown field 'offset'"),
    ],
)
def test_a_signed_statement_out_of_order_is_refused(svid, identity, changes, message):
    with pytest.raises(Malformed, match=message):
        verified(signed(svid, **changes), identity)


@pytest.mark.slow
def test_a_statement_of_too_many_files_or_digests_is_refused(svid, identity):
    many = [FILE | {"name": str(n)} for n in range(statement.MAX_FILES + 1)]
    with pytest.raises(Malformed, match="the limit is 10000"):
        verified(signed(svid, files=many), identity)
    long = [FILE | {"digests": ["3" * 64] * (statement.MAX_RESOURCES + 1)}]
    with pytest.raises(Malformed, match="65537 digests; the limit is 65536"):
        verified(signed(svid, files=long), identity)


def test_a_payload_without_end_is_refused(svid, identity, monkeypatch):
    endless = signed(svid)
    monkeypatch.setattr(statement, "MAX_PAYLOAD_BYTES", 100)
    with pytest.raises(Malformed, match="more than the limit of 100"):
        verified(endless, identity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chain": ["!"]}, "not base64"),
        ({"chain": [1]}, "of kind int"),
        ({"chain": ["AA=="] * 9}, "9 certificates; the limit is 8"),
        ({"payload": "AA"}, "not base64"),
        ({"signature": ...}, "'signature' is missing"),
        ({"more": 1}, "unknown field 'more'"),
    ],
)
def test_an_answer_out_of_order_is_refused(svid, identity, changes, message):
    answer = statement.sign(made(), svid) | changes
    with pytest.raises(Malformed, match=message):
        verified({k: v for k, v in answer.items() if v is not ...}, identity)


@pytest.mark.parametrize("chain", [[], ["AAAA"]], ids=["none", "nonsense"])
def test_a_chain_that_is_none_is_refused(svid, identity, chain):
    with pytest.raises(VerificationError, match="certificate"):
        verified(statement.sign(made(), svid) | {"chain": chain}, identity)


def test_a_signature_of_the_payload_alone_is_no_signature(svid, identity):
    """Whatever else the SVID's key signs cannot pass for a statement."""
    message = signed(svid)
    bare = svid.key.sign(
        base64.b64decode(message["payload"]), ec.ECDSA(hashes.SHA256())
    )
    message["signature"] = base64.b64encode(bare).decode()
    with pytest.raises(VerificationError, match="its signature does not hold"):
        verified(message, identity)


def test_a_peer_that_is_not_to_be_believed_is_asked_nothing_more(svid, identity):
    def check(peer):
        raise Unauthenticated("no", f"{peer.id} is in quarantine")

    with pytest.raises(Unauthenticated, match="in quarantine"):
        verified(statement.sign(made(), svid) | {"signature": "AAAA"}, identity, check)


def test_a_key_of_another_svid_signs_nothing_for_the_broker(authority, svid, identity):
    other = replace(svid, key=authority.issue(BROKER_ID).key)
    with pytest.raises(VerificationError, match="its signature does not hold"):
        verified(statement.sign(made(), other), identity)


def test_a_nonce_is_never_used_twice():
    nonces = {Request.new(REQUEST.ref).nonce for _ in range(100)}
    assert len(nonces) == 100
    assert {len(nonce) for nonce in nonces} == {64}
