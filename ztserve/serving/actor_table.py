"""What Ray's actor table says of a process that claims an identity.

Hygiene, as all inside one Ray cluster: whoever holds the cluster's token can make an
actor of any name. It keeps a worker's children, and workers that run no actor of ours,
from taking a name, and binds the directory's to the directory. Which service a
deployment is, the table does not know: that, entries with ``ray:deployment`` say.
"""

from ztserve.identity import SpiffeId
from ztserve.identity.agent.attestation import CannotTell, FalseClaim, Process
from ztserve.serving import ray_private
from ztserve.serving.ray_private import Actor

_MAX_KNOWN = 4096


class ActorTable:
    """Judges processes of the node `node` by the actor that they run.

    `named` are the IDs that only an actor of a certain name may have; all others are
    for replicas of Serve.
    """

    def __init__(
        self, node: str, *, namespace: str, named: dict[SpiffeId, str]
    ) -> None:
        self._node = node
        self._namespace = namespace
        self._named = named
        self._known: dict[Process, Actor] = {}

    def check(self, process: Process, spiffe_id: SpiffeId) -> None:
        """Raise FalseClaim unless the actor in `process` may be `spiffe_id`.

        Raises CannotTell where Ray does not answer.
        """
        actor = self._actor(process)
        if actor is None:
            raise FalseClaim(
                f"process {process.pid} is a Ray worker, runs no actor, and claims "
                f"{spiffe_id}"
            )
        name = self._named.get(spiffe_id)
        if name is None:
            allowed = ray_private.replica_place(actor) is not None
        else:
            allowed = (actor.namespace, actor.name) == (self._namespace, name)
        if not allowed:
            raise FalseClaim(
                f"process {process.pid} runs the actor {actor.name or '(no name)'!r} of"
                f" {actor.namespace!r:.80}, and none such may be {spiffe_id}"
            )

    def selectors(self, process: Process) -> tuple[str, ...]:
        """Return the ``ray:`` selectors of `process`; none if it runs no replica.

        Raises CannotTell where Ray does not answer.
        """
        actor = self._actor(process)
        place = actor and ray_private.replica_place(actor)
        if place is None:
            return ()
        app, deployment = place
        return (
            f"ray:app:{app}",
            f"ray:deployment:{deployment}",
            f"ray:node:{self._node}",
        )

    def _actor(self, process: Process) -> Actor | None:
        known = self._known.get(process)
        if known is not None:
            return known  # a worker runs one actor in its life
        try:
            found = ray_private.actor_of(process.pid, self._node)
        except ray_private.ASK_ERRORS as error:
            raise CannotTell(f"Ray's actor table cannot be asked: {error}") from error
        if found is not None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[process] = found
        return found
