"""Our messages against the protocol's, and the committed code against its source."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from tritonclient.grpc import service_pb2

from ztserve.doors.v1 import registry_pb2
from ztserve.transport.v1 import directory_pb2, health_pb2, inference_pb2

ROOT = Path(__file__).parents[3]
OWN_MESSAGES = {"ModelMetadataResponse.PropertiesEntry"}
OWN_FIELDS = {("ModelMetadataResponse", "properties")}


def fields(message, prefix: str = "") -> dict[tuple[str, str], tuple]:
    name = prefix + message.name
    found = {
        (name, f.name): (f.number, f.type, f.is_repeated, f.containing_oneof and 1)
        for f in message.fields
    }
    for nested in message.nested_types:
        found |= fields(nested, name + ".")
    return found


def test_every_field_has_the_number_and_type_that_stock_clients_use() -> None:
    ours = {}
    for message in inference_pb2.DESCRIPTOR.message_types_by_name.values():
        ours |= fields(message)
    theirs = {}
    for name in inference_pb2.DESCRIPTOR.message_types_by_name:
        theirs |= fields(service_pb2.DESCRIPTOR.message_types_by_name[name])
    extra = {key for key in ours if key not in theirs}
    assert {key[0] for key in extra} - OWN_MESSAGES == {"ModelMetadataResponse"}
    assert extra - OWN_FIELDS == {
        (OWN, field) for OWN in OWN_MESSAGES for field in ("key", "value")
    }
    assert {key: ours[key] for key in theirs} == theirs


def test_ours_and_a_stock_client_live_in_one_process() -> None:
    assert service_pb2.ModelInferRequest is not inference_pb2.ModelInferRequest
    sent = service_pb2.ModelInferRequest(model_name="m", id="1")
    sent.inputs.add(name="x", datatype="FP32", shape=[1]).contents.fp32_contents.append(
        2
    )
    got = inference_pb2.ModelInferRequest.FromString(sent.SerializeToString())
    assert got.inputs[0].contents.fp32_contents == [2]


def test_under_the_protocols_own_package_they_could_not() -> None:
    naive = descriptor_pb2.FileDescriptorProto()
    inference_pb2.DESCRIPTOR.CopyToProto(naive)
    naive.name, naive.package = "naive.proto", "inference"
    text = naive.SerializeToString().replace(b".ztserve.transport.v1.", b".inference.")
    with pytest.raises((TypeError, Exception)):
        descriptor_pool.Default().AddSerializedFile(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [inference_pb2, directory_pb2, health_pb2, registry_pb2]
)
def test_the_committed_code_is_what_its_proto_says(module, tmp_path: Path) -> None:
    out = tmp_path / "set.pb"
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"),
            *(
                f"--descriptor_set_out={out}",
                str(ROOT / "proto" / module.DESCRIPTOR.name),
            ),
        ],
        check=True,
        timeout=60,
    )
    made = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]
    committed = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(committed)
    for one in (made, committed):
        for message in one.message_type:
            _without_json_names(message)
    assert made == committed


def _without_json_names(message) -> None:
    for field in message.field:
        field.ClearField("json_name")
    for nested in message.nested_type:
        _without_json_names(nested)
