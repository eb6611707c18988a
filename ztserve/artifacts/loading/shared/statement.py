"""What a broker says of memory that it shares, signed with the key of its SVID.

The signature is over DSSE's pre-authentication encoding of a payload type of its own,
so that it can be mistaken for nothing else that the key signs. Nothing in a statement
counts before its chain, the exact SPIFFE ID and the signature do; it answers one nonce,
and speaks of memory of this node since it was started (the kernel's boot ID): inode
numbers mean nothing elsewhere.
"""

import base64
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from ztserve import types
from ztserve.artifacts.loading.shared.memory import MemoryId
from ztserve.artifacts.statements.envelope import MAX_CERTIFICATES, pae
from ztserve.artifacts.statements.keys import signature_algorithm
from ztserve.artifacts.statements.manifest import MAX_FILES, MAX_RESOURCES
from ztserve.artifacts.statements.strict import (
    Malformed,
    Object,
    as_object,
    get,
    get_base64,
    get_objects,
    load_object,
    only,
)
from ztserve.errors import RegistryError, Unauthenticated, VerificationError
from ztserve.identity import Identity, Svid, verify_peer
from ztserve.types import ModelRef, Peer

PAYLOAD_TYPE = "application/vnd.ztserve.shared-weights.v1+json"
MAX_PAYLOAD_BYTES = 8 << 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_PSS = padding.PSS(
    mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.DIGEST_LENGTH
)


class Unproven(VerificationError):
    """The chain proves nobody to the bundles that we have now."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a replica asks a broker for."""

    ref: ModelRef
    """Fixed to a digest."""
    nonce: str
    """64 hex digits that were never used before."""

    @classmethod
    def new(cls, ref: ModelRef) -> "Request":
        """Return a request with a nonce of its own."""
        return cls(ref, secrets.token_hex(32))

    def message(self) -> dict[str, object]:
        """Return it as the wire has it."""
        return {"model": str(self.ref), "nonce": self.nonce}


@dataclass(frozen=True, slots=True)
class Statement:
    """What is in the memory whose descriptor comes with it."""

    nonce: str
    boot: str
    """The kernel's boot ID: of which node, and since when, it speaks."""
    manifest: str
    """``sha256:<hex>``: which model the files are."""
    memory: MemoryId
    sizes: Mapping[str, int]
    digests: Mapping[str, tuple[str, ...]]
    """Hex digits, of each file or of its shards, as the manifest has them hashed."""


def boot_id() -> str:
    """Return the name of this run of this node's kernel (random(4))."""
    return _BOOT_ID.read_text().strip()


def parse_request(message: Object) -> Request:
    """Read a replica's request; raises Malformed, ConfigError for no reference."""
    only(message, ("model", "nonce"), "the request")
    ref, nonce = ModelRef(get(message, "model", str)), get(message, "nonce", str)
    if ref.digest is None or not _HEX.match(nonce):
        raise Malformed("the request: expected a pinned model and a nonce of 64 digits")
    return Request(ref, nonce)


def sign(statement: Statement, svid: Svid) -> dict[str, object]:
    """Return the statement as the wire has it, signed, with the SVID's chain.

    Raises RegistryError where it is longer than those who verify it read.
    """
    payload = json.dumps(
        {
            "nonce": statement.nonce,
            "boot": statement.boot,
            "manifest": statement.manifest,
            "memory": statement.memory._asdict(),
            "files": [
                {"name": name, "size": size, "digests": list(statement.digests[name])}
                for name, size in statement.sizes.items()
            ],
        }
    ).encode()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise RegistryError(
            f"{len(statement.sizes)} files take a statement of {len(payload)} bytes, "
            f"more than the limit of {MAX_PAYLOAD_BYTES}"
        )
    message, key = pae(PAYLOAD_TYPE, payload), svid.key
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(message, _PSS, hashes.SHA256())
    else:
        signature = key.sign(message, signature_algorithm(key.curve))
    return {
        "payload": base64.b64encode(payload).decode(),
        "signature": base64.b64encode(signature).decode(),
        "chain": [base64.b64encode(one).decode() for one in svid.chain_der],
    }


def verify(
    message: Object,
    request: Request,
    broker_id: str,
    identity: Identity,
    check_peer: Callable[[Peer], None],
) -> Statement:
    """Return what the broker `broker_id` states in answer to `request`.

    1. Its chain proves, to the trust bundles of `identity`, exactly that SPIFFE ID.
    2. `check_peer` has nothing against it.
    3. The chain's key signed the statement.
    4. It answers this request's nonce, on this node, for this model.

    Raises VerificationError (1. Unproven), Malformed, and what `check_peer` raises.
    """
    only(message, ("payload", "signature", "chain"), "the answer")
    payload, signature = (
        get_base64(message, "payload"),
        get_base64(message, "signature"),
    )
    chain = _chain(message)
    try:
        peer = verify_peer(chain, identity.bundles, now=types.now())
    except Unauthenticated as error:
        raise Unproven(error.reason) from error
    check_signer(peer, broker_id)
    check_peer(peer)
    check_signature(chain[0], payload, signature)
    statement = _parse(payload)
    check_nonce(statement, request)
    check_node(statement)
    check_model(statement, request)
    return statement


def check_signer(peer: Peer, broker_id: str) -> None:
    """Raise VerificationError unless `peer` is the broker."""
    if peer.id != broker_id:
        raise VerificationError(f"{peer.id} answers, expected {broker_id}")


def check_signature(leaf_der: bytes, payload: bytes, signature: bytes) -> None:
    """Raise VerificationError unless the leaf's key signed the payload."""
    key = x509.load_der_x509_certificate(leaf_der).public_key()
    message = pae(PAYLOAD_TYPE, payload)
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, message, _PSS, hashes.SHA256())
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, signature_algorithm(key.curve))
        else:
            raise VerificationError("its key is neither EC nor RSA")
    except InvalidSignature as error:
        raise VerificationError("its signature does not hold") from error


def check_nonce(statement: Statement, request: Request) -> None:
    """Raise VerificationError unless the statement was made for this request."""
    if statement.nonce != request.nonce:
        raise VerificationError("it answers another nonce than ours: a replay")


def check_node(statement: Statement) -> None:
    """Raise VerificationError unless it is of this node, since it was started."""
    if statement.boot != boot_id():
        raise VerificationError(
            f"it is of the node with boot ID {statement.boot!r:.80}, not of this one"
        )


def check_model(statement: Statement, request: Request) -> None:
    """Raise VerificationError unless it is of the model that was asked for."""
    if statement.manifest != request.ref.digest:
        raise VerificationError(
            f"it is of the model {statement.manifest!r:.80}, not of {request.ref}"
        )


def _chain(message: Object) -> tuple[bytes, ...]:
    texts = get(message, "chain", list)
    if len(texts) > MAX_CERTIFICATES:
        raise Malformed(f"{len(texts)} certificates; the limit is {MAX_CERTIFICATES}")
    return tuple(get_base64({"certificate": text}, "certificate") for text in texts)


def _parse(payload: bytes) -> Statement:
    node = load_object(payload, limit=MAX_PAYLOAD_BYTES)
    only(node, ("nonce", "boot", "manifest", "memory", "files"), "the statement")
    memory = as_object(get(node, "memory", dict), "memory")
    only(memory, MemoryId._fields, "memory")
    sizes: dict[str, int] = {}
    digests: dict[str, tuple[str, ...]] = {}
    for file in get_objects(node, "files", limit=MAX_FILES):
        only(file, ("name", "size", "digests"), "a file")
        name = get(file, "name", str)
        if name in sizes:
            raise Malformed(f"the file {name!r:.80} is listed twice")
        sizes[name] = get(file, "size", int)
        digests[name] = _digests(file)
    return Statement(
        nonce=get(node, "nonce", str),
        boot=get(node, "boot", str),
        manifest=get(node, "manifest", str),
        memory=MemoryId(*(get(memory, key, int) for key in MemoryId._fields)),
        sizes=sizes,
        digests=digests,
    )


def _digests(file: Object) -> tuple[str, ...]:
    found = get(file, "digests", list)
    if len(found) > MAX_RESOURCES:
        raise Malformed(f"{len(found)} digests; the limit is {MAX_RESOURCES}")
    for digest in found:
        if type(digest) is not str or not _HEX.match(digest):
            raise Malformed(f"a digest of {get(file, 'name', str)!r:.80} is none")
    return tuple(found)
