"""A replica that has no path to the registry but the door."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.unit.artifacts.real import free_port
from ztserve import ModelRef, TensorSpec, VerifiedModel, ZTDeployment, audit, config
from ztserve.errors import RegistryError
from ztserve.serving.weights import check_published
from ztserve.testing import serve

pytestmark = pytest.mark.slow


class Scale(ZTDeployment):
    model = ModelRef("scale@production")
    inputs = (TensorSpec("x", "FP32", (-1, 1)),)
    outputs = (TensorSpec("y", "FP32", (-1, 1)),)

    def load(self, model: VerifiedModel) -> None:
        self.factor = dict(model.tensors())["factor"]

    def predict(self, x):
        return x * self.factor


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file({"factor": torch.tensor([3.0])}, folder / "model.safetensors")
    return folder


def test_a_replica_loads_its_model_through_the_door(weights):
    address = f"ztserve://127.0.0.1:{free_port()}"
    tables = {"artifacts": {"registry": address}}
    with serve(Scale, model=weights, tables=tables) as served:
        x = np.full((1, 1), 2, np.float32)
        assert served.client.infer({"x": x})["y"] == 6.0
        door = next(served.audit.parent.glob("registry-*.jsonl"))
        reads = [r for r in audit.read(door) if r.get("class_uid") == 6003]
    who = {r["actor"]["user"]["uid"] for r in reads}
    assert who == {served.server_id}
    assert {r["api"]["operation"] for r in reads} == {
        f"/v1/registry/scale/{verb}"
        for verb in ("resolve", "signature", "release", "attestations", "files", "read")
    }
    digest = served.replica.description.digest
    assert {r["unmapped"]["model"]["digest"] for r in reads} == {digest}


def test_a_replica_that_the_door_does_not_let_in_does_not_start(weights, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: door, namespace: ztserve}
spec:
  selector: {matchLabels: {app: registry}}
  rules:
    - from: [{source: {principals: ["cluster.local/ns/ml-inference/sa/scale"]}}]
      to: [{operation: {paths: ["/v1/registry/another"]}}]
"""
    )
    policy.chmod(0o600)
    address = f"ztserve://127.0.0.1:{free_port()}"
    tables = {"artifacts": {"registry": address, "wait_s": 0.5}}
    with (
        pytest.raises(RegistryError, match=r"must let .*/sa/scale GET /v1/registry/sc"),
        serve(Scale, model=weights, tables=tables, policies=(policy,)),
    ):
        pass


def test_run_says_what_it_does_not_check(tmp_path):
    from ztserve.cli.init import initialise

    initialise(tmp_path)
    toml = tmp_path / "ztserve.toml"
    text = toml.read_text()
    toml.write_text(text.replace(".ztserve/registry", "ztserve://127.0.0.1:7444"))
    told = check_published(config.load(toml), [ModelRef("scale"), ModelRef("b:1")])
    assert told == (
        "not checked before Ray starts: whether scale, b:1 can be had from "
        "ztserve://127.0.0.1:7444, which answers replicas"
    )
