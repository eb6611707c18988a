"""gRPC's health checking: its stock client against our server."""

from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.unit.transport.support import CLI, Echo, Served, refused, serving
from ztserve.transport.v1 import health_pb2 as ours
from ztserve.types import Call, Description, operations

Code = grpc.StatusCode
Asked = health_pb2.HealthCheckRequest
Said = health_pb2.HealthCheckResponse


class Unready(Echo):
    def describe(self, call: Call) -> Description:
        return replace(super().describe(call), ready=False)


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService"])
def test_a_stock_client_is_told_that_the_server_serves(served: Served, service) -> None:
    with served.channel() as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(Asked(service=service), timeout=5).status == Said.SERVING
    assert served.service.calls[0].operation == operations("echo")["ServerReady"]


def test_it_is_told_that_the_server_is_not_ready(authority) -> None:
    with serving(authority, Unready()) as served, served.channel() as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(Asked(), timeout=5).status == Said.NOT_SERVING


def test_another_service_is_not_found(served: Served) -> None:
    with served.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(Asked(service="other"), timeout=5)
    assert refused(caught.value) == (
        Code.NOT_FOUND,
        "service 'other' is not served here",
        "NotFound",
    )


def test_who_may_not_ask_for_readiness_may_not_ask_in_this_way(authority) -> None:
    closed = Echo(denied=frozenset({CLI}))
    with (
        serving(authority, closed) as served,
        served.channel() as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        health_pb2_grpc.HealthStub(channel).Check(Asked(service="x"), timeout=5)
    assert caught.value.code() is Code.PERMISSION_DENIED


def test_to_watch_is_not_offered_and_said_so_as_the_protocol_asks(served) -> None:
    with served.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        next(health_pb2_grpc.HealthStub(channel).Watch(Asked(), timeout=5))
    assert caught.value.code() is Code.UNIMPLEMENTED


def test_numbers_are_those_of_the_protocol() -> None:
    for name in ("HealthCheckRequest", "HealthCheckResponse"):
        one, other = getattr(ours, name).DESCRIPTOR, getattr(health_pb2, name)
        assert {(f.name, f.number, f.type) for f in one.fields} == {
            (f.name, f.number, f.type) for f in other.DESCRIPTOR.fields
        }
    assert ours.HealthCheckResponse.ServingStatus.items() == Said.ServingStatus.items()
