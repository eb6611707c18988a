"""One replica: its rooms, built from the settings around a user's class. No Ray."""

import asyncio
import hashlib
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ztserve import transport
from ztserve.artifacts import FollowedPolicy, Memory, TrustPolicy, VerifiedModel
from ztserve.config import (
    Settings,
    admit,
    admitted,
    follow_trust,
    limits,
    load_policies,
    open_log,
    open_quarantine,
    open_tokens,
    record_refusal,
    shared_memory,
)
from ztserve.errors import (
    CallError,
    ConfigError,
    IdentityError,
    VerificationError,
)
from ztserve.filtering import OutputFilter, TextFilter
from ztserve.identity import JwtProof, Source
from ztserve.inference import Runner
from ztserve.pipeline import Pipeline
from ztserve.serving.parts import NO_ARGUMENTS, admitted_class
from ztserve.serving.weights import Pin, Weights
from ztserve.serving.withdrawal import GRACE_S, Withdrawal
from ztserve.types import Description, ModelRef, TextSpec, operations
from ztserve.validation import Validator

if TYPE_CHECKING:
    from ztserve.serving.deployment import ZTDeployment


@dataclass(frozen=True)
class Plan:
    """What a deployment is, frozen when it is bound: all its replicas agree on it."""

    settings: Settings
    models: Mapping[str, ModelRef]
    """By part; the sole part of most models is ''."""
    deploy: str
    """Names this deploy: aliases are resolved once under it."""
    max_ongoing: int = 32
    max_queued: int = 64
    name: str = ""
    """Of the deployment, as Ray Serve calls it."""
    target: str = ""
    """``module:qualname`` of its class; '': the class itself travels with the shell."""
    service: str = ""


class Replica:
    """A running deployment: an mTLS address that answers verified callers.

    Args:
        deployment: the user's class; None: the one that the plan names, imported once
            the code that it lies in was held against the deployment bundle.
        plan: what was frozen at bind.
        source: this replica's own identity.
        name: names the replica in the audit.
        arguments: the constructor's, as they are signed (`parts.arguments_of`).
        pin: given the resolved digest of a part, returns the one that this deploy uses.
        on_withdrawn: called when the replica takes no more calls for good, before the
            running ones have ended.
        summon: starts the node's weights broker; None: the weights are not shared.

    """

    def __init__(  # noqa: PLR0913 - each has a default, but for the first three
        self,
        deployment: "type[ZTDeployment] | None",
        plan: Plan,
        source: Source,
        *,
        name: str,
        pin: Pin = lambda _part, digest: digest,
        on_withdrawn: Callable[[], None] = lambda: None,
        summon: Callable[[], None] | None = None,
        arguments: Callable[[], str] = lambda: NO_ARGUMENTS,
    ) -> None:
        self.plan = plan
        self.source = source
        self._pin = pin
        self._on_withdrawn = on_withdrawn
        self._summon = summon
        service = plan.service if deployment is None else deployment.service
        self._log = open_log(plan.settings, service, name, source)
        self.signed = admit(plan.settings, self._log)
        with admitted(self._log):
            self.deployment, self.part = admitted_class(
                deployment, plan, self.signed, arguments
            )
        self.quarantine = open_quarantine(plan.settings)
        self.tokens = open_tokens(plan.settings, source)
        self._policies = load_policies(
            plan.settings,
            service=self.deployment.service,
            namespace=plan.settings.identity.namespace,
            labels=self.deployment.labels,
            operations=operations(self.model_name).values(),
            signed=self.signed,
        )
        self._server: transport.Server | None = None
        self._runner: Runner | None = None
        self._walk: Pipeline | None = None
        self._withdrawal: Withdrawal | None = None
        self._withdrawn = ""
        self._leaving = threading.Lock()
        self.address = ""
        self.description: Description | None = None

    @property
    def model_name(self) -> str:
        """The name by which callers ask for the model."""
        sole = self.plan.models.get("")
        return sole.name if sole else self.deployment.service

    @property
    def ongoing(self) -> int:
        """Calls that are running or queued."""
        return self._runner.ongoing if self._runner else 0

    @property
    def outcomes(self) -> Mapping[str, int]:
        """Calls so far by outcome."""
        return self._walk.outcomes if self._walk else {}

    def start(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}) -> str:
        """Verify and load the weights, then open the door; return the address.

        Raises VerificationError at once; waits, bounded, for a registry that is away.
        """
        weights = Weights(
            self.plan.settings,
            self._log,
            self._pin,
            self.source,
            self.quarantine,
            self._memory(),
            lazy=self.deployment.lazy_weights,
            check=self._check_model,
        )
        with weights.verified(self.plan.models) as models:
            followed = self._followed(weights)
            instance = self._loaded(models, args, kwargs)
            self.description = self._describe(models)
        del models  # what the class has let go is not kept
        self._runner = Runner(
            instance.predict,
            inputs=self.deployment.inputs,
            outputs=self.deployment.outputs,
            batch=self.deployment.batch,
            device=instance.device,
            max_ongoing=self.plan.max_ongoing,
            max_queued=self.plan.max_queued,
        )
        self._walk = self._pipeline(self._runner)
        self._server = self._serve(self._walk)
        settings = self.plan.settings.transport
        host, port = self._server.start(
            settings.host, range(settings.first_port, settings.last_port + 1)
        )
        self.address = f"{host}:{port}"
        if followed is not None:
            self._withdrawal = Withdrawal(
                followed,
                weights.held,
                self._log,
                self._withdraw,
                self._check_still,
            )
            self._withdrawal.start()
        self._log.event(
            "replica-started", address=self.address, digest=self.description.digest
        )
        return self.address

    def refused(self, what: str, error: CallError) -> None:
        """Audit an attempt that did not come over the wire."""
        self._log.refused(what, error, principal="", address="")

    def check_health(self) -> None:
        """Raise where the replica cannot answer: no valid SVID, or no open door.

        VerificationError where the trust policy has turned against its model.
        """
        if self._withdrawn:
            raise VerificationError(self._withdrawn)
        if self._withdrawal is not None and not self._withdrawal.looks:
            raise VerificationError("nothing follows the trust policy any more")
        self.source.current()
        if self._server is None:
            raise IdentityError("the mTLS server is not running")

    def stop(self, grace_s: float) -> None:
        """Stop taking calls, let the running ones end within `grace_s`, then close."""
        if self._withdrawal is not None:
            self._withdrawal.close()
        self._close_door(grace_s)
        if self._runner is not None:
            self._runner.close()
        self._log.event("replica-stopped", address=self.address)
        self._log.close()
        self.quarantine.close()
        if self.tokens is not None:
            self.tokens.close()

    def _followed(self, weights: Weights) -> FollowedPolicy | None:
        """Return the trust policy to follow; None without models and bundle."""
        followed = weights.followed
        if followed is None and self.signed is not None:
            followed = follow_trust(self.plan.settings)
        if followed is not None:
            # Read anew since the bundle was verified: it could be an older one by now.
            self._check_still(followed.policy)
        return followed

    def _check_model(self, part: str, ref: ModelRef, digest: str) -> None:
        if self.signed is not None and self.part is not None:
            self.signed.check_model(self.part, part, ref, digest)

    def _check_still(self, trust: TrustPolicy) -> None:
        if self.signed is not None:
            self.signed.check_still(trust)

    def _withdraw(self, error: VerificationError) -> None:
        """Take no more calls, and let the running ones end; Serve replaces us."""
        self._withdrawn = f"{self.model_name} is withdrawn from this replica: {error}"
        self._log.event(
            "model-withdrawn",
            model=self.model_name,
            digest=self.description.digest if self.description else "",
            reason=str(error),
        )
        try:
            self._on_withdrawn()
        finally:
            self._close_door(GRACE_S)

    def _close_door(self, grace_s: float) -> None:
        with self._leaving:
            server, self._server = self._server, None
            if server is not None:
                server.stop(grace_s)

    # --- start-up -----------------------------------------------------------------

    def _memory(self) -> Memory | None:
        if self._summon is None:
            return None
        return shared_memory(
            self.plan.settings, self.source, self._log, self.quarantine, self._summon
        )

    def _loaded(
        self,
        models: Mapping[str, VerifiedModel],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> "ZTDeployment":
        instance = self.deployment(*args, **kwargs)
        instance.device = _device()
        sole = models.get("")
        _finish(instance.load(sole if sole is not None else (dict(models) or None)))
        return instance

    def _describe(self, models: Mapping[str, VerifiedModel]) -> Description:
        sole = models.get("")
        version, digest = (sole.version, sole.digest) if sole else ("", "")
        if models and sole is None:
            parts = "".join(
                f"{part}={m.digest}\n" for part, m in sorted(models.items())
            )
            digest = "sha256:" + hashlib.sha256(parts.encode()).hexdigest()
        return Description(
            model=self.model_name,
            version=version,
            digest=digest,
            inputs=self.deployment.inputs,
            outputs=self.deployment.outputs,
        )

    def _pipeline(self, runner: Runner) -> Pipeline:
        settings = self.plan.settings
        outputs = self.deployment.outputs
        text = any(isinstance(spec, TextSpec) for spec in outputs)
        if self.description is None:
            raise ConfigError("a replica is described before its pipeline is built")
        return Pipeline(
            self.description,
            policies=self._policies,
            validator=Validator(
                self.deployment.inputs,
                model=self.model_name,
                max_rows=settings.validation.max_rows,
                max_bytes=settings.transport.max_message_bytes,
            ),
            runner=runner,
            outputs=OutputFilter(
                outputs,
                text=TextFilter.default() if text else None,
                max_bytes=settings.filtering.max_output_bytes,
            ),
            log=self._log,
        )

    def _serve(self, pipeline: Pipeline) -> transport.Server:
        version = self.description.version if self.description else ""
        log = self._log
        return transport.Server(
            transport.inference_methods(pipeline, self.model_name, version),
            source=self.source,
            limits=limits(self.plan.settings),
            delegates=self.plan.settings.authorization.delegates,
            on_refused=lambda refusal: record_refusal(log, refusal),
            on_handshake_refused=log.refused_handshakes,
            quarantine=self.quarantine,
            proof=None
            if self.tokens is None
            else JwtProof(self.tokens.authorities, self.source.current().svid.id),
        )


def _device() -> Any:
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.device("cuda")
    return "cpu"


def _finish(result: Any) -> None:
    """Run an async `load` to its end, on a loop and a thread of its own."""
    if not inspect.isawaitable(result):
        return
    failure: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(_awaited(result))
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread
            failure.append(error)

    thread = threading.Thread(target=run, name="ztserve-load")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


async def _awaited(result: Any) -> None:
    await result
