"""Attacks on the wire, from the outermost to the innermost; each is refused.

Each function plays one attacker, who can do a little more than the one before, and
returns what that attacker learnt. The legitimate gateway lends its identity only for
those who are meant to have taken a gateway over.
"""

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import numpy as np

from examples.refusals.outcome import LetInError, Refusal, refused
from ztserve import Client
from ztserve.errors import Denied, InvalidInput
from ztserve.identity import Authority, Identity, Source, Svid, dns_name
from ztserve.types import Caller, Request, Tensor

TIMEOUT_S = 10.0
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""How an HTTP/2 client begins (RFC 9113, 3.4): its preface and empty settings."""
_SERVER_METADATA = "/inference.GRPCInferenceService/ServerMetadata"
_SETTINGS = 4
"""The type of the frame with which an HTTP/2 server answers."""


@dataclass(frozen=True)
class Door:
    """A running replica, and two identities of its own trust domain."""

    address: str
    """``host:port``"""
    server_id: str
    """Its SPIFFE ID."""
    gateway: Source
    """One whom the policy lets predict."""
    stranger: Source
    """One whom the policy does not name."""
    model: str = "digits"
    max_message_bytes: int = 8 << 20
    """What a message may have, as ``[transport]`` in ztserve.toml says."""

    @contextlib.contextmanager
    def client(self, source: Source) -> Iterator[Client]:
        """Speak to the replica as `source`."""
        with Client(
            self.address,
            source=source,
            server_id=self.server_id,
            model=self.model,
            timeout_s=TIMEOUT_S,
        ) as client:
            yield client


def _pixels(rows: int = 1) -> np.ndarray:
    return np.zeros((rows, 64), np.float32)


# --- strangers, who get no further than the handshake ---------------------------


def plain_tcp(door: Door) -> Refusal:
    """Speak HTTP/2 in the clear, as an old client or a port scanner would."""
    return Refusal("plain TCP", _knock(door, None), "not TLS")


def no_certificate(door: Door) -> Refusal:
    """Speak TLS, but say not who one is."""
    return Refusal(
        "TLS without certificate", _knock(door, _tls()), "no client certificate"
    )


def foreign_authority(door: Door) -> Refusal:
    """Make an authority of the same name, and have it vouch for the gateway."""
    gateway = door.gateway.current().svid.id
    forged = Authority(gateway.trust_domain).issue(gateway)
    return Refusal(
        "certificate of a foreign authority",
        _knock(door, _tls(forged)),
        "certificate not trusted",
    )


def _knock(door: Door, tls: ssl.SSLContext | None) -> str:
    """Try to begin HTTP/2; return how the server refused, or raise LetInError."""
    host, _, port = door.address.rpartition(":")
    try:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(
                socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
            )
            if tls is not None:
                # In TLS 1.3 a client is done before the server has judged it.
                connection = stack.enter_context(tls.wrap_socket(connection))
            connection.sendall(_HELLO)
            answer = connection.recv(9)
    except ConnectionRefusedError:
        raise
    except ssl.SSLError as error:
        # OpenSSL's words: TLSV13_ALERT_CERTIFICATE_REQUIRED, TLSV1_ALERT_INTERNAL_ERROR
        return f"TLS alert: {(error.reason or 'none').rpartition('ALERT_')[2]}"
    except ConnectionError:
        return "connection reset"
    if len(answer) > 3 and answer[3] == _SETTINGS:
        raise LetInError("the server began to speak HTTP/2")
    return "connection closed" if not answer else f"closed after {answer.hex(' ')}"


def _tls(svid: Svid | None = None) -> ssl.SSLContext:
    """Return what an attacker uses, who does not care whom it speaks to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if svid is not None:
        # OpenSSL takes keys from files only; this one is in memory.
        with os.fdopen(os.memfd_create("forged"), "wb") as file:
            file.write(svid.key_pem() + svid.chain_pem())
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context


# --- verified peers, who may not ------------------------------------------------


def wrong_identity(door: Door) -> Refusal:
    """Call from another service of the same trust domain."""
    title = "right authority, wrong identity"
    with door.client(door.stranger) as client, refused(title, Denied) as told:
        client.infer({"pixels": _pixels()})
    return Refusal(title, told.saw, told.error)


def forged_caller(door: Door) -> Refusal:
    """Call from that service, and claim to speak for the gateway itself."""
    title = "forged caller header"
    gateway = door.gateway.current().svid.id
    claim = Caller(
        gateway.trust_domain, str(gateway), {"role": "admin"}, proof="x509-svid"
    )
    with door.client(door.stranger) as client, refused(title, Denied) as told:
        client.infer({"pixels": _pixels()}, caller=claim)
    return Refusal(title, told.saw, told.error)


def denied_giant_body(door: Door, mebibytes: int = 60) -> Refusal:
    """Have the server read a giant body before it finds out that it should not."""
    title = f"denied body of {mebibytes} MiB"
    tensor = Tensor("pixels", "FP32", (1, 64), bytes(mebibytes << 20))
    start = time.perf_counter()
    with door.client(door.stranger) as client, refused(title, Denied) as told:
        client.send(Request(door.model, "", "", (tensor,)))
    seconds = time.perf_counter() - start
    return Refusal(title, f"{told.saw} ({seconds:.2f} s)", told.error)


def path_not_allowed(door: Door) -> Refusal:
    """Ask as the gateway, which may predict, what kind of server this is.

    With nothing but grpcio: no client of ours stands in the way of the attacker.
    """
    title = "right identity, path not allowed"
    try:
        with _channel(door, door.gateway.current()) as channel:
            # An empty message, so there is nothing to serialise.
            call = channel.unary_unary(_SERVER_METADATA, None, None)
            call(b"", timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.PERMISSION_DENIED:
            raise
        return Refusal(title, f"{error.code().name}: {error.details()}", "Denied")
    raise LetInError(f"{title}: was not refused")


def _channel(door: Door, who: Identity) -> grpc.Channel:
    roots = who.bundles[who.svid.id.trust_domain]
    credentials = grpc.ssl_channel_credentials(
        "".join(map(ssl.DER_cert_to_PEM_cert, roots)).encode(),
        who.svid.key_pem(),
        who.svid.chain_pem(),
    )
    name = ("grpc.ssl_target_name_override", dns_name(door.server_id))
    return grpc.secure_channel(door.address, credentials, options=(name,))


# --- the gateway, taken over ----------------------------------------------------


def malformed_tensor(door: Door) -> Refusal:
    """Announce 64 pixels and send seven bytes."""
    title = "malformed tensor"
    tensor = Tensor("pixels", "FP32", (1, 64), b"\0" * 7)
    with door.client(door.gateway) as client, refused(title, InvalidInput) as told:
        client.send(Request(door.model, "", "", (tensor,)))
    return Refusal(title, told.saw, told.error)


def not_a_number(door: Door) -> Refusal:
    """Send a pixel that no comparison can bound."""
    title = "NaN"
    pixels = _pixels()
    pixels[0, 7] = np.nan
    with door.client(door.gateway) as client, refused(title, InvalidInput) as told:
        client.infer({"pixels": pixels})
    return Refusal(title, told.saw, told.error)


def oversized_message(door: Door) -> Refusal:
    """Send one row more than a message may hold."""
    title = "oversized message"
    rows = door.max_message_bytes // (64 * 4) + 1
    with door.client(door.gateway) as client, refused(title, InvalidInput) as told:
        client.infer({"pixels": _pixels(rows)})
    return Refusal(title, told.saw, told.error)


ALL: tuple[Callable[[Door], Refusal], ...] = (
    plain_tcp,
    no_certificate,
    foreign_authority,
    wrong_identity,
    path_not_allowed,
    forged_caller,
    malformed_tensor,
    not_a_number,
    oversized_message,
    denied_giant_body,
)
"""In the order of how far each one gets."""
