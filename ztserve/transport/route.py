"""What a client knows of the way to its server; no I/O.

`upkeep.Upkeep` keeps it up to date.
"""

from collections.abc import Collection

from ztserve import types
from ztserve.errors import (
    ConfigError,
    IdentityError,
    InvalidInput,
    Unavailable,
    ZTServeError,
)
from ztserve.identity import Identity, Quarantine, Source, SpiffeId
from ztserve.transport.directory import Endpoint, checked_address, checked_deployment
from ztserve.transport.loop.channel import Channel, Expected
from ztserve.transport.replicas import Replicas
from ztserve.transport.tls import Ends

DIRECTORY = "ns/ztserve/sa/directory"
"""Path of the directory door's SPIFFE ID, in our own trust domain."""


class Route:
    """Whom a client expects, under which identity, and where the replicas are.

    `target` is ``host:port``, which needs `server_id`, or ``namespace/service``, which
    needs `directory`. Raises ConfigError for anything else, IdentityError where
    `source` has no valid identity or no trust bundle to verify the server by.
    """

    def __init__(
        self,
        target: str,
        source: Source,
        server_id: str | None,
        directory: str | None,
        directory_id: str | None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.source = source
        self.quarantine = quarantine
        identity = source.current()
        own = identity.svid.id
        self.target = target
        self.deployment = "/" in target
        self.directory = directory or ""
        try:
            self.server = _expected(target, server_id, own)
            if self.deployment:
                checked_address(self.directory)
        except InvalidInput as error:
            raise ConfigError(
                f"Client({target!r}): {error}; give host:port and server_id, or "
                "namespace/service and the directory's host:port"
            ) from None
        self.directory_id = SpiffeId.parse(
            directory_id or f"spiffe://{own.trust_domain}/{DIRECTORY}"
        )
        if not identity.bundles.get(self.server.trust_domain):
            raise IdentityError(
                f"cannot verify {self.server}: there is no trust bundle of "
                f"{self.server.trust_domain}; federate with it"
            )
        self.identity: Identity | None = identity
        self.trusted = True
        """Whether we have an identity, and the server may be called."""
        self.model = ""
        ends = Ends(source)
        self._expected = Expected(ends, self.server, quarantine)
        self.book = Expected(ends, self.directory_id, quarantine)
        """What the directory is judged by."""
        self.replicas = Replicas(lambda address: Channel(address, self._expected))
        self.trouble: Exception | None = None
        """Why the directory or the source last failed."""
        self.addresses: Collection[str] = () if self.deployment else (target,)

    def channel(self, avoid: Collection[str]) -> Channel:
        """Take a channel for a call. Raises IdentityError, or Unavailable."""
        self._check_called(self.server)
        identity = self.identity
        if identity is None or types.now() > identity.svid.not_after:
            raise IdentityError(f"no call without an identity: {self.trouble}")
        try:
            return self.replicas.take(avoid)
        except Unavailable:
            # What the directory said of us tells more, e.g. Denied.
            if self.deployment and isinstance(self.trouble, ZTServeError):
                raise self.trouble from None
            raise Unavailable(f"no replica of {self.target} is known") from None

    def adopt(self) -> bool:
        """Take the identity that the source has now; return whether it is a new one.

        Raises IdentityError where there is none, Unavailable where the server may not
        be called.
        """
        older = self.identity
        self.trusted = False
        try:
            self.identity = self.source.current()
            self._check_called(self.server)
        except (IdentityError, Unavailable) as error:
            if isinstance(error, IdentityError):
                self.identity = None
            self.trouble = error
            raise
        self.trusted = True
        return self.identity is not older

    def check_directory(self) -> None:
        """Raise IdentityError or Unavailable where it may not be followed now."""
        self.source.current()
        self._check_called(self.directory_id)

    def _check_called(self, spiffe_id: SpiffeId) -> None:
        if self.quarantine is not None:
            self.quarantine.check_server(spiffe_id)

    def announce(self, endpoints: Collection[Endpoint]) -> None:
        """Take what the directory says."""
        self.addresses = frozenset(endpoint.address for endpoint in endpoints)
        for endpoint in endpoints:
            self.model = endpoint.model
        self.trouble = None


def _expected(target: str, server_id: str | None, own: SpiffeId) -> SpiffeId:
    if "/" not in target:
        checked_address(target)
        if server_id is None:
            raise InvalidInput("an address proves nothing")
        return SpiffeId.parse(server_id)
    namespace, service = checked_deployment(target).split("/")
    return SpiffeId.parse(
        server_id or f"spiffe://{own.trust_domain}/ns/{namespace}/sa/{service}"
    )
