"""Every error that ztserve raises on purpose.

::

    ZTServeError
    ├── ConfigError                 start-up: a person mends it
    ├── IdentityError               no usable SVID, bundle or SPIFFE ID
    ├── ArtifactError
    │   ├── RegistryError           the registry is away or answers nonsense
    │   └── VerificationError       signature, digest, name or policy do not hold
    ├── AuditError                  the audit log cannot be written or read
    ├── CallError(public, reason)   one call ends here; the caller learns `public` only
    │   ├── Unauthenticated         the peer's identity does not hold
    │   ├── Denied                  no policy lets this peer do this
    │   ├── InvalidInput            the request is not what the model takes
    │   ├── NotFound                no such model or deployment
    │   ├── Overloaded              a limit on calls or bytes in flight is reached
    │   ├── DeadlineExceeded        the caller's deadline passed
    │   ├── Cancelled               the caller went away
    │   ├── Unavailable             no replica took the call; it surely did not run
    │   ├── Interrupted             the connection broke; the call may have run
    │   └── Withheld                the output may not leave
    └── InferenceError              the model's own code failed; told to the audit only

Errors know no status code: ``transport/status.py`` holds the one table. A check
returns the next value or raises one of these; nothing returns a bool to be forgotten.
"""


class ZTServeError(Exception):
    """The root: catch this to catch whatever ztserve raises on purpose."""


class ConfigError(ZTServeError):
    """The configuration cannot be used; the message says where and what to write."""


class IdentityError(ZTServeError):
    """There is no usable SVID, trust bundle or SPIFFE ID."""


class ArtifactError(ZTServeError):
    """A model artifact cannot be had."""


class RegistryError(ArtifactError):
    """The registry is away, has no such model, or answers out of bounds."""


class VerificationError(ArtifactError):
    """A model failed verification and must not be served."""


class AuditError(ZTServeError):
    """The audit log cannot be written, so the call cannot be answered."""


class CallError(ZTServeError):
    """One call ends here.

    `public` is all that the caller is told; `reason` goes to the audit.
    """

    def __init__(self, public: str, reason: str = "") -> None:
        super().__init__(public, reason)
        self.public = public
        self.reason = reason or public

    def __str__(self) -> str:
        return self.reason


class Unauthenticated(CallError):
    """The peer's identity does not hold (any more)."""


class Denied(CallError):
    """No policy lets this peer, for this caller, do this."""


class InvalidInput(CallError):
    """The request is not what the model takes."""


class NotFound(CallError):
    """There is no such model or deployment here."""


class Overloaded(CallError):
    """A limit on calls or bytes in flight is reached; try again later."""


class DeadlineExceeded(CallError):
    """The caller's deadline passed before the answer was ready."""


class Cancelled(CallError):
    """The caller went away before the answer was ready."""


class Unavailable(CallError):
    """No replica could take the call; it surely did not run."""


class Interrupted(CallError):
    """The connection broke after the call was sent; it may have run."""


class Withheld(CallError):
    """The model's output may not leave."""


class InferenceError(ZTServeError):
    """The model's own code failed; the wire says only that it did."""
