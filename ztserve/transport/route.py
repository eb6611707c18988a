"""What a client knows of the way to its server; no I/O.

`Client` and `AsyncClient` keep it up to date, each in its own way of waiting.
"""

from collections.abc import Collection
from typing import Generic, TypeVar

from ztserve import types
from ztserve.errors import (
    ConfigError,
    IdentityError,
    InvalidInput,
    Unavailable,
    ZTServeError,
)
from ztserve.identity import Identity, Quarantine, Source, SpiffeId
from ztserve.transport import channels, protocol
from ztserve.transport.directory import Endpoint, checked_deployment, checked_target
from ztserve.transport.replicas import Lane, Replicas

C = TypeVar("C")

DIRECTORY = "ns/ztserve/sa/directory"
"""Path of the directory door's SPIFFE ID, in our own trust domain."""


class Route(Generic[C]):
    """Whom a client expects, under which identity, and where the replicas are.

    `target` is ``host:port``, which needs `server_id`, or ``namespace/service``, which
    needs `directory`. Raises ConfigError for anything else, IdentityError where
    `source` has no valid identity or no trust bundle to verify the server by.
    """

    def __init__(
        self,
        target: str,
        source: Source,
        replicas: Replicas[C],
        server_id: str | None,
        directory: str | None,
        directory_id: str | None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.source = source
        self.quarantine = quarantine
        self.identity: Identity | None = source.current()
        own = self.identity.svid.id
        self.target = target
        self.deployment = "/" in target
        self.directory = directory or ""
        try:
            self.server = _expected(target, server_id, own)
            if self.deployment:
                checked_target(self.directory)
        except InvalidInput as error:
            raise ConfigError(
                f"Client({target!r}): {error}; give host:port and server_id, or "
                "namespace/service and the directory's host:port"
            ) from None
        self.directory_id = SpiffeId.parse(
            directory_id or f"spiffe://{own.trust_domain}/{DIRECTORY}"
        )
        self.model = ""
        self.replicas = replicas
        self.options = channels.options(self.server, protocol.MAX_MESSAGE_BYTES)
        self.credentials = channels.credentials(self.identity, self.server)
        self.generation = 0
        self.patient = True
        """Whether older lanes may serve until newer ones are ready."""
        self.distrusted = 0
        """What runs on lanes of generations below this is to be broken off soon."""
        self.trouble: Exception | None = None
        """Why the directory or the source last failed."""
        self.addresses: Collection[str] = () if self.deployment else (target,)

    def lane(self, avoid: Collection[str]) -> Lane[C]:
        """Take a lane for a call. Raises IdentityError, or Unavailable."""
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

    def look(self) -> list[str]:
        """Take the identity that the source has now.

        Return the addresses that need a new lane. Where there is no identity any
        more, or no bundle to verify the server by, or the server is in quarantine, no
        lane is left.
        """
        try:
            identity = self.source.current()
            if identity is not self.identity:
                self._adopt(identity)
            self._check_called(self.server)
        except (IdentityError, Unavailable) as error:
            if isinstance(error, IdentityError):
                self.identity = None
            self.trouble = error
            self.replicas.keep_only(())
            self.generation += 1
            self.distrusted = self.generation
            return []
        self.replicas.keep_only(self.addresses)
        return self.replicas.outdated(self.addresses, self.generation)

    def renew(self) -> None:
        """Have each replica verified anew, over a new connection."""
        self.generation += 1
        self.patient = True

    def _adopt(self, identity: Identity) -> None:
        self.options = channels.options(self.server, protocol.MAX_MESSAGE_BYTES)
        self.credentials = channels.credentials(identity, self.server)
        trust_domain, older = self.server.trust_domain, self.identity
        # Where a root was withdrawn, what it vouched for must not serve any longer.
        self.patient = older is not None and set(older.bundles[trust_domain]) <= set(
            identity.bundles[trust_domain]
        )
        self.identity = identity
        self.generation += 1
        if not self.patient:
            self.distrusted = self.generation

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
        checked_target(target)
        if server_id is None:
            raise InvalidInput("an address proves nothing")
        return SpiffeId.parse(server_id)
    namespace, service = checked_deployment(target).split("/")
    return SpiffeId.parse(
        server_id or f"spiffe://{own.trust_domain}/ns/{namespace}/sa/{service}"
    )
