"""What a replica does with weights, and writes of them: whole, or lazily."""

import gc
import logging
import struct
import tempfile
import weakref

import numpy as np
import pytest
from safetensors.numpy import save_file

from ztserve import ModelRef, TensorSpec, ZTDeployment
from ztserve.artifacts.publish import signing
from ztserve.errors import ConfigError, InferenceError, VerificationError
from ztserve.serving import weights
from ztserve.testing import serve

pytestmark = pytest.mark.slow

ROWS, SHARD = 64, 4096


class Half(ZTDeployment):
    """Holds the rows of one rank of two."""

    model = ModelRef("halves@production")
    lazy_weights = True
    inputs = (TensorSpec("x", "FP32", (-1, 1)),)
    outputs = (TensorSpec("y", "FP32", (-1, 1)),)
    seen = None

    def load(self, model):
        self.rows = model.rows("w", 0, ROWS // 2)
        type(self).seen = weakref.ref(model)

    def predict(self, x):
        return x + self.rows.sum()


class Whole(Half):
    lazy_weights = False


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model of 64 rows of ones; signed in small shards wherever it is served."""
    monkeypatch.setattr(signing, "SHARDS_FROM_BYTES", 0)
    monkeypatch.setattr(signing, "SHARD_BYTES", SHARD)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = tmp_path / "model"
    root.mkdir()
    save_file({"w": np.ones((ROWS, 512), np.float32)}, root / "model.safetensors")
    return root


def verified(served):
    records = served.records()
    (event,) = [r for r in records if r.get("activity_name") == "model-verified"]
    return event["unmapped"]


def test_a_lazy_deployment_reads_its_rows_and_the_audit_says_what_it_did_not(folder):
    with serve(Half, model=folder) as served:
        assert served.client.infer({"x": [[1.0]]})["y"].tolist() == [[1 + 32 * 512.0]]
        event = verified(served)
    size = (folder / "model.safetensors").stat().st_size
    assert event["bytes"] == size
    assert size - 2 * SHARD <= event["unread_bytes"] < size


def test_a_deployment_that_is_not_lazy_has_nothing_unread(folder):
    with serve(Whole, model=folder) as served:
        event = verified(served)
    size = (folder / "model.safetensors").stat().st_size
    assert (event["unread_bytes"], event["bytes"]) == (0, size)
    assert 0 < event["seconds"] < 60


def test_weights_are_read_in_load_and_never_later(folder):
    class Late(Half):
        service = "half"

        def load(self, model):
            super().load(model)
            self.model = model

        def predict(self, x):
            return x + self.model.rows("w", ROWS // 2, ROWS).sum()

    with serve(Late, model=folder) as served:
        with pytest.raises(InferenceError):
            served.client.infer({"x": [[1.0]]})
        told = [r for r in served.records() if "ask for them in load()" in str(r)]
    assert told


def poison(folder):
    """Change the first weights in every registry beside the folder."""
    (blob,) = [
        path
        for path in folder.parent.glob("ztserve-testing-*/.ztserve/registry/blobs/*/*")
        if path.stat().st_size > ROWS * 512 * 4
    ]
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(2 * SHARD)
        file.write(struct.pack("<f", 666))


def test_a_shard_that_was_changed_keeps_the_replica_from_starting(folder, tmp_path):
    class Unlucky(Half):
        service = "half"

        def load(self, model):
            poison(folder)
            super().load(model)

    audit = {"audit": {"directory": str(tmp_path / "audit")}}
    with (
        pytest.raises(VerificationError, match=r"changed after signing: .* 8192 to"),
        serve(Unlucky, model=folder, tables=audit),
    ):
        pass
    (log,) = (tmp_path / "audit").glob("*.jsonl")
    assert '"model-refused"' in log.read_text()
    assert "was changed after signing" in log.read_text()


@pytest.mark.parametrize("deployment", [Half, Whole])
def test_a_model_that_the_class_lets_go_is_not_kept(folder, deployment):
    with serve(deployment, model=folder):
        gc.collect()
        assert deployment.seen() is None


def test_a_long_load_is_told_of_in_the_log(folder, monkeypatch, caplog):
    monkeypatch.setattr(weights, "_TELL_S", 0.0)
    with caplog.at_level(logging.INFO, "ray.serve"), serve(Whole, model=folder):
        pass
    (line, *_) = [r.getMessage() for r in caplog.records if "loading" in r.getMessage()]
    assert line.startswith("loading halves@sha256:")
    assert line.endswith("GiB/s")


def test_lazy_weights_that_are_not_yes_or_no_are_refused():
    with pytest.raises(
        ConfigError, match="lazy_weights must be True or False, got 'y'"
    ):
        type("Wrong", (Half,), {"lazy_weights": "y"})
