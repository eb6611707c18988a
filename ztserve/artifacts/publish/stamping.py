"""Signing with an SVID, and with a timestamp over the signature.

The timestamp comes from an authority in process, or from one over HTTP (RFC 3161, 3.4).
Its answer is held against what was asked before anything is written.
"""

import base64
import hashlib
import http.client
import json
import os
import secrets
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeAlias
from urllib.parse import SplitResult

from cryptography.hazmat.primitives.asymmetric import ec

from ztserve import types
from ztserve.artifacts.publish.keys import SigningKey
from ztserve.artifacts.publish.timestamps import LocalAuthority
from ztserve.artifacts.registry.address import (
    check_port,
    split_url,
    without_secrets,
)
from ztserve.artifacts.statements import der
from ztserve.artifacts.statements.cms import SHA256
from ztserve.artifacts.statements.envelope import IN_TOTO_TYPE
from ztserve.artifacts.statements.strict import Malformed
from ztserve.artifacts.statements.timestamps import (
    MAX_TIMESTAMP_BYTES,
    check_timestamp,
    parse_timestamp,
    signing_certificate,
)
from ztserve.errors import ArtifactError, ConfigError, VerificationError
from ztserve.identity.svid import Svid

ASK_S = 10.0
"""Longest that a timestamp authority over HTTP may take for all of its answer."""
MAX_OFF = timedelta(minutes=1)
"""How far an authority's clock may be from ours when we sign."""

Stamp: TypeAlias = Callable[[bytes], bytes]
"""From the bytes of a signature to an RFC 3161 response (DER) over them."""


class StatementSigner(Protocol):
    """Whatever signs a statement: a key in a file, an SVID, either with a timestamp."""

    @property
    def id(self) -> str:
        """``sha256:<hex>`` of the key."""
        ...

    def envelope(self, payload: bytes, *, payload_type: str = IN_TOTO_TYPE) -> bytes:
        """Sign a payload; return the bundle."""
        ...


class SvidKey:
    """Signs with the key of an SVID; its certificates go into the bundle."""

    def __init__(self, svid: Svid) -> None:
        """Raise ConfigError for an SVID whose key is not elliptic-curve."""
        if not isinstance(svid.key, ec.EllipticCurvePrivateKey):
            raise ConfigError(
                f"the SVID of {svid.id} has an RSA key; OpenSSF Model Signing needs "
                "one on P-256, P-384 or P-521: set the issuer's key type"
            )
        self._key = SigningKey(svid.key)
        self._chain = svid.chain_der
        self.id = self._key.id

    def envelope(self, payload: bytes, *, payload_type: str = IN_TOTO_TYPE) -> bytes:
        """Sign a payload; return the bundle, with `x509CertificateChain`."""
        bundle = json.loads(self._key.envelope(payload, payload_type=payload_type))
        bundle["verificationMaterial"] = {
            "x509CertificateChain": {
                "certificates": [{"rawBytes": _base64(each)} for each in self._chain]
            },
            "tlogEntries": [],
        }
        return json.dumps(bundle).encode()


class TimestampedSigner:
    """Another signer, whose signatures are stamped."""

    def __init__(self, signer: StatementSigner, stamp: Stamp) -> None:
        self._signer = signer
        self._stamp = stamp
        self.id = signer.id

    def envelope(self, payload: bytes, *, payload_type: str = IN_TOTO_TYPE) -> bytes:
        """Sign a payload; return the bundle, with a timestamp over the signature.

        Raises what the stamp raises.
        """
        bundle: dict[str, Any] = json.loads(
            self._signer.envelope(payload, payload_type=payload_type)
        )
        signature = base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"])
        bundle["verificationMaterial"]["timestampVerificationData"] = {
            "rfc3161Timestamps": [{"signedTimestamp": _base64(self._stamp(signature))}]
        }
        return json.dumps(bundle).encode()


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


# --- asking ---------------------------------------------------------------------


def stamp_with(authority: LocalAuthority | str, *, timeout_s: float = ASK_S) -> Stamp:
    """Return what stamps signatures: an authority in process, or one at a URL.

    The stamp raises ArtifactError where the authority cannot be reached or breaks off,
    VerificationError where its answer is not one to what was asked.
    """
    if isinstance(authority, str):
        url = _timestamp_url(authority)
        return lambda message: _stamp(
            message,
            lambda query: _post(url, query, timeout_s),
            without_secrets(url.geturl()),
        )
    return lambda message: _stamp(message, authority.answer, "the local authority")


def _stamp(message: bytes, ask: Callable[[bytes], bytes], where: str) -> bytes:
    nonce = secrets.randbits(64)
    answer = ask(query(message, nonce))
    try:
        check_answer(answer, message, nonce, now=types.now())
    except Malformed as error:
        raise VerificationError(f"timestamp from {where}: {error}") from error
    return answer


def query(message: bytes, nonce: int) -> bytes:
    """Return a TimeStampReq (RFC 3161, 2.4.1) for the message's SHA-256."""
    algorithm = der.sequence(der.oid(SHA256), der.element(der.NULL))
    digested = der.element(der.OCTETS, hashlib.sha256(message).digest())
    return der.sequence(
        der.integer(1),
        der.sequence(algorithm, digested),
        der.integer(nonce),
        der.element(der.BOOLEAN, b"\xff"),  # with certificates, please
    )


def check_answer(answer: bytes, message: bytes, nonce: int, *, now: datetime) -> None:
    """Raise Malformed unless an answer is to this query, and of this moment.

    Whether its authority counts is for the verifiers' trust policy to say.
    """
    timestamp = parse_timestamp(answer)
    check_timestamp(timestamp, message, signing_certificate(timestamp))
    if timestamp.nonce != nonce:
        raise Malformed("the answer is to another query (its nonce differs)")
    if abs(timestamp.time - now) > MAX_OFF:
        raise Malformed(
            f"its clock says {timestamp.time:%Y-%m-%d %H:%M:%S} UTC, ours "
            f"{now:%Y-%m-%d %H:%M:%S}: set the one that is wrong"
        )


def _timestamp_url(text: str) -> SplitResult:
    shown = without_secrets(text)
    try:
        url = split_url(text)
        check_port(url)
    except ValueError as error:
        raise ConfigError(f"timestamp authority {shown!r}: {error}") from error
    usable = url.scheme in {"http", "https"} and url.hostname and "@" not in url.netloc
    if not usable or not text.isascii():
        raise ConfigError(
            f"timestamp authority {shown!r}: expected a URL as https://host/path "
            "(http will do: its answer is signed), in ASCII, without user name"
        )
    return url


def _post(url: SplitResult, query: bytes, timeout_s: float) -> bytes:
    """Return the answer's body; redirects are not followed. Raises ArtifactError."""
    host, tls = str(url.hostname), url.scheme == "https"
    where = f"timestamp authority {without_secrets(url.geturl())}"
    late = threading.Event()
    try:
        raw = socket.create_connection(
            (host, url.port or (443 if tls else 80)), timeout=timeout_s
        )
        # A twin of the socket ends it when time is up, whatever reads from it then.
        twin = socket.socket(fileno=os.dup(raw.fileno()))
        timer = threading.Timer(timeout_s, _break_off, (twin, late))
        timer.start()
        try:
            body = _exchange(raw, url, query)
            if late.is_set():  # what has no length looks whole where it was cut off
                raise TimeoutError
            return body
        finally:
            timer.cancel()
            twin.close()
            raw.close()
    except (OSError, http.client.HTTPException) as error:
        why = f"took longer than {timeout_s:g} s" if late.is_set() else repr(error)
        raise ArtifactError(f"{where}: {why}; try again, or another one") from error


def _break_off(twin: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # it has just ended by itself
        twin.shutdown(socket.SHUT_RDWR)


def _exchange(raw: socket.socket, url: SplitResult, query: bytes) -> bytes:
    host = str(url.hostname)
    connection = http.client.HTTPConnection(host, url.port)
    try:
        connection.sock = (
            ssl.create_default_context().wrap_socket(raw, server_hostname=host)
            if url.scheme == "https"
            else raw
        )
        target = (url.path or "/") + (f"?{url.query}" if url.query else "")
        connection.request(
            "POST",
            target,
            body=query,
            headers={
                "Content-Type": "application/timestamp-query",
                "Accept": "application/timestamp-reply",
            },
        )
        answer = connection.getresponse()
        kind = answer.getheader("Content-Type", "").partition(";")[0].strip().lower()
        if answer.status != 200 or kind != "application/timestamp-reply":
            raise http.client.HTTPException(
                f"status {answer.status} with {kind[:80]!r}, expected 200 with "
                "application/timestamp-reply"
            )
        body = answer.read(MAX_TIMESTAMP_BYTES + 1)
        if len(body) > MAX_TIMESTAMP_BYTES:
            raise http.client.HTTPException(f"more than {MAX_TIMESTAMP_BYTES} bytes")
        if answer.length:
            raise http.client.IncompleteRead(body, answer.length)
        return body
    finally:
        connection.close()
