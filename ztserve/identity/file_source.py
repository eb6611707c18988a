"""A live identity from files that somebody else writes and renews."""

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.guarded_files import MissingFileError
from ztserve.identity.source import LOOK_S, LiveSource
from ztserve.identity.spiffe_id import trust_domain_name
from ztserve.identity.svid import read_identity
from ztserve.identity.svid_files import (
    Contents,
    material,
    read_files,
    read_folder,
)

_LOG = logging.getLogger(__name__)

_GONE_LOOKS = 2
"""For how many looks in a row files must be missing to be withdrawn."""


class _DiskSource(LiveSource):
    """What both layouts have in common: looks, every `interval_s`, at what is there.

    What is there is believed whole or not at all, and only after `read_identity` and
    if two readings in a row agree: a key that is not the certificate's, in the middle
    of a change, leaves the old identity until it expires. Files that are gone are a
    withdrawal, at the second look that misses them.
    """

    def __init__(
        self,
        whence: str,
        read: Callable[[], Contents],
        *,
        trust_domain: str,
        timeout_s: float,
        interval_s: float,
        clock: Callable[[], datetime],
    ) -> None:
        super().__init__(whence, "not read yet", clock=clock)
        self._read = read
        self._own = trust_domain_name(trust_domain)
        self._interval_s = interval_s
        self._next_look = 0.0
        self._believed = b""
        self._left_out: tuple[str, ...] = ()
        self._missed = 0
        deadline = time.monotonic() + timeout_s
        self._look()
        while self._identity is None and time.monotonic() < deadline:
            time.sleep(min(LOOK_S, interval_s))
            self._look()
        self.current()  # raises IdentityError
        self._keeper.start()

    def _look(self) -> None:
        """Take what is on disk, if it is time to and something changed."""
        if time.monotonic() < self._next_look and self._identity is not None:
            return
        self._next_look = time.monotonic() + self._interval_s
        try:
            self._take()
            self._missed = 0
        except MissingFileError as error:
            self._note(str(error))
            self._missed += 1
            if self._missed >= _GONE_LOOKS:
                self._believed = b""
                self._drop(f"its files are gone: {error}")
        except IdentityError as error:
            self._note(str(error))

    def _take(self) -> None:
        contents = self._read()
        for problem in contents.left_out:
            if problem not in self._left_out:  # once for each cause
                _LOG.error("%s; no SVID of that trust domain is believed", problem)
        self._left_out = contents.left_out
        digest = contents.digest()
        if digest == self._believed:
            return
        if self._read().digest() != digest:
            self._next_look = 0.0
            raise IdentityError("the files changed while they were read")
        identity = read_identity(material(contents, own=self._own), now=self._clock())
        self._adopt(identity)
        self._believed = digest


class FileSource(_DiskSource):
    """The identity in three PEM files, as spiffe-helper and CSI drivers write them.

    `certificate` holds the chain, leaf first; `key` its PKCS#8 key, not encrypted;
    `bundle` the roots of `trust_domain`, of which the SVID must be; `federated` names
    the bundle files of other trust domains; one that is gone or not in order
    is logged, and its trust domain no longer trusted. Files, the directories above
    them and the links of a Kubernetes volume must be ours or root's and not writable by
    others; the key not readable by others.

    The constructor waits up to `timeout_s` for files that are not there or do not hold,
    and raises IdentityError after that. They are read anew every `interval_s`.
    """

    def __init__(  # noqa: PLR0913
        self,
        certificate: Path,
        key: Path,
        bundle: Path,
        *,
        trust_domain: str,
        federated: Mapping[str, Path] | None = None,
        timeout_s: float = 0.0,
        interval_s: float = 1.0,
        clock: Callable[[], datetime] = types.now,
    ) -> None:
        others = {trust_domain_name(n): p for n, p in (federated or {}).items()}
        if trust_domain in others:
            raise IdentityError(
                f"{trust_domain} is our own domain, not a federated one"
            )
        super().__init__(
            f"the SVID files beside {certificate}",
            partial(
                read_files,
                certificate,
                key,
                {trust_domain: bundle, **others},
                own=trust_domain,
            ),
            trust_domain=trust_domain,
            timeout_s=timeout_s,
            interval_s=interval_s,
            clock=clock,
        )


class FolderSource(_DiskSource):
    """The identity in a credential folder (SPIFFE Filesystem Delivery standard).

    The folder holds ``credential-bundle.private-key.pem``, which is key and chain in
    one, and ``<trust domain>.spiffe-trust-bundle.pem`` for each trust domain; one that
    is gone is no longer trusted. All else is as with `FileSource`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        trust_domain: str,
        timeout_s: float = 0.0,
        interval_s: float = 1.0,
        clock: Callable[[], datetime] = types.now,
    ) -> None:
        super().__init__(
            f"the SPIFFE credential folder {folder}",
            partial(read_folder, folder, own=trust_domain),
            trust_domain=trust_domain,
            timeout_s=timeout_s,
            interval_s=interval_s,
            clock=clock,
        )
