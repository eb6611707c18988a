"""What is made of Ray's actor table; that Ray fills it so, tests/ray shows."""

import warnings
from dataclasses import dataclass, field

import pytest

from ztserve.identity import SpiffeId
from ztserve.identity.agent.attestation import CannotTell, FalseClaim, Process

pytest.importorskip("ray")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Ray itself warns of is not ours to mend
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData
    from ray.exceptions import RaySystemError

    from ztserve.serving import ray_private
    from ztserve.serving.actor_table import ActorTable
    from ztserve.serving.ray_private import Actor

pytestmark = pytest.mark.slow  # imports Ray

HERE, ELSEWHERE = "aa" * 28, "bb" * 28
DIRECTORY = SpiffeId("spiffe://td.example/ns/ztserve/sa/directory")
DIGITS = SpiffeId("spiffe://td.example/ns/ml-inference/sa/digits")
PROCESS = Process(pid=7, started=1, uid=0, gid=0)
REPLICA = ("SERVE_REPLICA::default#Digits#r1", "serve")
DIRECTORY_ACTOR = ("ztserve-directory-project-node", "ztserve")


@dataclass
class Accessor:
    """Answers as Ray's does, with rows in Ray's own format."""

    rows: list[tuple[str, bytes]] = field(default_factory=list)
    asked: int = 0
    fault: Exception | None = None

    def add(self, name, namespace, *, pid=7, node=HERE, phase="ALIVE"):
        row = ActorTableData(name=name, ray_namespace=namespace, pid=pid)
        row.address.node_id = bytes.fromhex(node)
        self.rows.append((phase, row.SerializeToString()))

    def get_actor_table(self, job_id, phase):
        if self.fault is not None:
            raise self.fault
        self.asked += 1
        return [row for found, row in self.rows if found == phase]


@pytest.fixture
def ray_(monkeypatch):
    accessor = Accessor()
    monkeypatch.setattr(state, "_connect_and_get_accessor", lambda: accessor)
    return accessor


@pytest.fixture
def table():
    return ActorTable(
        HERE, namespace="ztserve", named={DIRECTORY: "ztserve-directory-project-node"}
    )


@pytest.mark.parametrize("phase", ["ALIVE", "PENDING_CREATION", "RESTARTING"])
def test_a_process_is_known_by_the_actor_that_it_runs_or_is_about_to(ray_, phase):
    ray_.add("dead", "serve", phase="DEAD")
    ray_.add("other", "serve", pid=8)
    ray_.add("elsewhere", "serve", node=ELSEWHERE)
    assert ray_private.actor_of(7, HERE) is None
    ray_.add("mine", "serve", phase=phase)
    assert ray_private.actor_of(7, HERE) == Actor("mine", "serve")


def test_each_actor_may_register_what_is_its_own(ray_, table):
    ray_.add(*REPLICA)
    ray_.add(*DIRECTORY_ACTOR, pid=8)
    table.check(PROCESS, DIGITS)
    table.check(Process(8, 1, 0, 0), DIRECTORY)


@pytest.mark.parametrize(
    ("actor", "spiffe_id"),
    [
        (REPLICA, DIRECTORY),
        (DIRECTORY_ACTOR, DIGITS),
        ((DIRECTORY_ACTOR[0], "mine"), DIRECTORY),
        ((DIRECTORY_ACTOR[0] + "x", "ztserve"), DIRECTORY),
        ((REPLICA[0], "mine"), DIGITS),
        (("", "serve"), DIGITS),
    ],
)
def test_an_actor_of_another_kind_may_not(ray_, table, actor, spiffe_id):
    ray_.add(*actor)
    with pytest.raises(FalseClaim, match=f"none such may be {spiffe_id}"):
        table.check(PROCESS, spiffe_id)


def test_a_worker_that_runs_no_actor_may_not(ray_, table):
    with pytest.raises(FalseClaim, match=f"runs no actor, and claims {DIGITS}"):
        table.check(PROCESS, DIGITS)
    assert table.selectors(PROCESS) == ()
    ray_.add(*REPLICA)  # what it did not run then, it may run now
    table.check(PROCESS, DIGITS)


def test_a_replica_s_selectors_are_its_app_deployment_and_node(ray_, table):
    ray_.add(*REPLICA)
    ray_.add(*DIRECTORY_ACTOR, pid=8)
    expected = ("ray:app:default", "ray:deployment:Digits", f"ray:node:{HERE}")
    assert table.selectors(PROCESS) == expected
    assert table.selectors(Process(8, 1, 0, 0)) == ()


def test_ray_is_asked_once_of_each_process(ray_, table):
    ray_.add(*REPLICA)
    table.check(PROCESS, DIGITS)
    asked = ray_.asked
    table.check(PROCESS, DIGITS)
    assert ray_.asked == asked
    ray_.rows.clear()
    with pytest.raises(FalseClaim):  # the pid is another's now, and Ray is asked anew
        table.check(Process(7, 2, 0, 0), DIGITS)


@pytest.mark.parametrize("fault", [RaySystemError("no GCS"), RuntimeError("closed")])
def test_where_ray_does_not_answer_nothing_is_decided(ray_, table, fault):
    ray_.fault = fault
    with pytest.raises(CannotTell, match="actor table cannot be asked"):
        table.check(PROCESS, DIGITS)
    with pytest.raises(CannotTell, match="actor table cannot be asked"):
        table.selectors(PROCESS)
