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
