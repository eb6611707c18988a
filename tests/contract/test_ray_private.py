"""The private names of Ray that serving stands on, one by one.

Seen on Ray 2.60.0. A Ray that lacks one of them fails here, and not in a replica.
"""

import inspect

import pytest

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_serve_tells_whether_a_handle_is_calling():
    from ray.serve.context import _get_serve_request_context

    assert _get_serve_request_context().request_id == ""


def test_a_bound_application_knows_its_deployment():
    from ray import serve

    from ztserve.serving import ray_private

    class Anything:
        pass

    bound = serve.deployment(Anything).bind()
    assert ray_private.deployment_of(bound).func_or_class is Anything


def test_the_long_poll_client_is_made_as_we_make_it():
    from ray.serve._private.long_poll import LongPollClient, LongPollNamespace

    parameters = list(inspect.signature(LongPollClient.__init__).parameters)[1:]
    assert parameters == [
        "host_actor",
        "key_listeners",
        "call_in_event_loop",
        "client_id",
    ]
    assert LongPollNamespace.DEPLOYMENT_TARGETS


def test_what_a_running_replica_tells_reaches_the_long_poll():
    from ray.serve._private.common import DeploymentTargetInfo, RunningReplicaInfo

    assert "running_replicas" in {*inspect.signature(DeploymentTargetInfo).parameters}
    assert "replica_metadata" in {*inspect.signature(RunningReplicaInfo).parameters}


def test_token_authentication_can_be_asked_for():
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    assert isinstance(is_token_auth_enabled(), bool)


def test_the_options_that_keep_a_bad_update_from_hurting_exist():
    from ray.serve.deployment import Deployment

    taken = inspect.signature(Deployment.options).parameters
    assert {"max_surge_percent", "max_constructor_retry_count"} <= set(taken)


def test_the_actor_table_names_the_actor_that_a_process_runs():
    from ray._private.state import state
    from ray._raylet import GlobalStateAccessor
    from ray.core.generated.gcs_pb2 import ActorTableData

    assert callable(state._connect_and_get_accessor)
    assert GlobalStateAccessor.get_actor_table.__doc__.startswith(
        "GlobalStateAccessor.get_actor_table(self, job_id, actor_state_name)"
    )
    phases = {"ALIVE", "PENDING_CREATION", "RESTARTING"}
    assert phases <= set(ActorTableData.ActorState.keys())
    fields = {"pid", "address", "name", "ray_namespace"}
    assert fields <= {field.name for field in ActorTableData.DESCRIPTOR.fields}


def test_a_replica_s_actor_is_named_after_its_app_and_deployment():
    from ray.serve._private.common import DeploymentID, ReplicaID

    from ztserve.serving import ray_private
    from ztserve.serving.ray_private import Actor

    name = ReplicaID("r1", DeploymentID("Digits", "default")).to_full_id_str()
    assert name == "SERVE_REPLICA::default#Digits#r1"
    assert ray_private.replica_place(Actor(name, "serve")) == ("default", "Digits")
    for other in (Actor(name, "mine"), Actor("SERVE_CONTROLLER_ACTOR", "serve")):
        assert ray_private.replica_place(other) is None
    for hostile in ("SERVE_REPLICA::", "SERVE_REPLICA::a#b#c#d"):
        assert ray_private.replica_place(Actor(hostile, "serve")) is None


def test_a_replica_knows_how_many_there_may_be(monkeypatch):
    from types import SimpleNamespace

    from ray import serve
    from ray.serve._private.config import DeploymentConfig
    from ray.serve.config import AutoscalingConfig

    from ztserve.serving import ray_private

    def most(**options):
        made = SimpleNamespace(_deployment_config=DeploymentConfig(**options))
        monkeypatch.setattr(serve, "get_replica_context", lambda: made)
        return ray_private.most_replicas()

    assert most(num_replicas=1) == 1
    assert most(num_replicas=3) == 3
    assert most(autoscaling_config=AutoscalingConfig(max_replicas=5)) == 5
