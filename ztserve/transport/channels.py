"""What a client's channel shows, and what it demands of the server.

The server's exact SPIFFE ID is verified inside the handshake, before a byte of a
request leaves: its certificate must be signed by the roots of that ID's own trust
domain, and of no other, and bear the DNS name that the authority derives from the
whole ID (`identity.dns_name`). gRPC compares DNS names only; the URI name itself is
out of its reach. So this holds where the authority alone makes such names, as the
embedded one does.
"""

import ssl
from typing import TypeAlias

import grpc

from ztserve.errors import IdentityError
from ztserve.identity import Identity, SpiffeId, dns_name

Options: TypeAlias = tuple[tuple[str, int | str], ...]


def credentials(identity: Identity, server: SpiffeId) -> grpc.ChannelCredentials:
    """Return credentials that show `identity` and accept only the server `server`.

    Raises IdentityError where we hold no bundle of the server's trust domain.
    """
    roots = identity.bundles.get(server.trust_domain)
    if not roots:
        raise IdentityError(
            f"cannot verify {server}: there is no trust bundle of "
            f"{server.trust_domain}; federate with it"
        )
    svid = identity.svid
    return grpc.ssl_channel_credentials(
        root_certificates="".join(map(ssl.DER_cert_to_PEM_cert, roots)).encode(),
        private_key=svid.key_pem(),
        certificate_chain=svid.chain_pem(),
    )


def options(server: SpiffeId, max_message_bytes: int) -> Options:
    """Return the options of a channel to `server`.

    No proxy, no service configuration from DNS, no session tickets, no subchannel
    shared with another identity; a server that is back is tried again soon.
    """
    return (
        ("grpc.ssl_target_name_override", dns_name(server)),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.absolute_max_metadata_size", 16 * 1024),
        ("grpc.enable_http_proxy", 0),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    )
