"""Against MLflow's own server, in an environment of its own."""

import json
import urllib.request
from itertools import count
from urllib.parse import quote

import pytest

from tests.unit.artifacts.real import free_port, program, running
from ztserve.artifacts import open_registry, verify_model
from ztserve.errors import RegistryError, VerificationError
from ztserve.types import ModelRef

pytestmark = pytest.mark.slow


NUMBERS = count(1)


class Mlflow:
    """A tracking server, and what a training pipeline does with it."""

    def __init__(self, base):
        self.base = base
        self.url = f"mlflow+{base}"
        self.folders = {}

    def _send(self, verb, path, body):
        request = urllib.request.Request(f"{self.base}{path}", body, method=verb)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def post(self, call, **body):
        raw = self._send("POST", f"/api/2.0/mlflow/{call}", json.dumps(body).encode())
        return json.loads(raw or b"{}")

    def put(self, path, content):
        self._send("PUT", f"/api/2.0/mlflow-artifacts/artifacts/{quote(path)}", content)

    def log(self, root, name):
        """Upload a directory as a run's artifact, and register it as a version.

        Return the version's number, and the path of the artifact.
        """
        run = self.post("runs/create", experiment_id="0")["run"]["info"]
        source = f"{run['artifact_uri']}/model"
        folder = source.removeprefix("mlflow-artifacts:/")
        for path in sorted(root.rglob("*")):
            if path.is_file():
                self.put(f"{folder}/{path.relative_to(root)}", path.read_bytes())
        made = self.post(
            "model-versions/create", name=name, source=source, run_id=run["run_id"]
        )
        return made["model_version"]["version"], folder


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [program("mlflow", "MLFLOW"), "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", "sqlite:///mlflow.db"]
    command += ["--artifacts-destination", "./artifacts"]
    base = f"http://127.0.0.1:{port}"
    with running(command, folder, f"{base}/health", wait_s=120):
        yield Mlflow(base)


@pytest.fixture
def digits(mlflow, workshop):
    """Two signed versions of a model whose name no other test uses."""
    name = f"digits-{next(NUMBERS)}"
    mlflow.post("registered-models/create", name=name)
    for number in ("1", "2"):
        files = {"below/vocab.txt": b"a b", "empty.txt": b""}
        root = workshop.signed(number, name, number, fill=float(number), files=files)
        made, mlflow.folders[name, number] = mlflow.log(root, name)
        assert made == number
    mlflow.post("registered-models/alias", name=name, alias="production", version="1")
    return name


def test_a_model_is_verified_by_version_alias_and_digest(mlflow, workshop, digits):
    pinned = {}
    for ref, version in {
        digits: "2",
        f"{digits}:1": "1",
        f"{digits}:2": "2",
        f"{digits}@production": "1",
    }.items():
        model = verify_model(mlflow.url, ref, workshop.trust)
        assert model.version == version
        assert "below/vocab.txt" in model.names
        pinned[version] = model.digest
    ref = f"{digits}:1@{pinned['1']}"
    assert verify_model(mlflow.url, ref, workshop.trust).version == "1"
    unversioned = ModelRef(f"{digits}@{pinned['1']}")
    with pytest.raises(RegistryError, match=r"has no .* \(by the tag ztserve.digest\)"):
        open_registry(mlflow.url).resolve(unversioned)
    mlflow.post(
        "model-versions/set-tag",
        name=digits,
        version="1",
        key="ztserve.digest",
        value=pinned["1"],
    )
    assert open_registry(mlflow.url).resolve(unversioned).version == "1"


@pytest.mark.parametrize("tail", [":9", "@canary"])
def test_what_is_not_there_is_a_registry_error(mlflow, digits, tail):
    with pytest.raises(RegistryError, match=f"has no {digits}{tail}"):
        open_registry(mlflow.url).resolve(ModelRef(digits + tail))
    with pytest.raises(RegistryError, match="has no nobody"):
        open_registry(mlflow.url).resolve(ModelRef("nobody"))


def test_files_are_read_by_ranges(mlflow, workshop, digits):
    registry = open_registry(mlflow.url)
    model = registry.resolve(ModelRef(f"{digits}:1"))
    content = (workshop.path / "1/model.safetensors").read_bytes()
    assert registry.files(model)["model.safetensors"] == len(content)
    with registry.open(model, "model.safetensors") as reader:
        memory = memoryview(bytearray(len(content)))
        assert reader.read_into(memory[50:90], 50) == 40
        assert reader.read_into(memory[90:], 90) == len(content) - 90
        assert reader.read_into(memory[:50], 0) == 50
    assert memory.tobytes() == content
    with pytest.raises(VerificationError, match="has no file 'x'"):
        registry.open(model, "x")


def test_an_artifact_that_anybody_overwrote_is_refused(mlflow, workshop, digits):
    path = mlflow.folders[digits, "2"] + "/model.safetensors"
    content = bytearray((workshop.path / "2/model.safetensors").read_bytes())
    content[-1] ^= 1
    mlflow.put(path, bytes(content))  # MLflow asks nobody who they are
    with pytest.raises(VerificationError, match=r"model.safetensors' was changed aft"):
        verify_model(mlflow.url, f"{digits}:2", workshop.trust)
    mlflow.put(mlflow.folders[digits, "2"] + "/extra.txt", b"x")
    with pytest.raises(VerificationError, match=r"extra file 'extra.txt'"):
        verify_model(mlflow.url, f"{digits}:2", workshop.trust)


def test_an_alias_that_anybody_moved_does_not_move_a_pinned_model(
    mlflow, workshop, digits
):
    registry = open_registry(mlflow.url)
    pinned = registry.resolve(ModelRef(f"{digits}@production")).ref
    mlflow.post("registered-models/alias", name=digits, alias="production", version="2")
    assert registry.resolve(ModelRef(f"{digits}@production")).version == "2"
    assert verify_model(registry, pinned, workshop.trust).version == "1"


def test_a_version_without_signature_is_refused(mlflow, workshop, digits):
    assert mlflow.log(workshop.model("3"), digits)[0] == "3"
    with pytest.raises(VerificationError, match=r"is not signed: it has no model.sig"):
        verify_model(mlflow.url, f"{digits}:3", workshop.trust)


def test_attestations_are_files_beside_the_signatures(mlflow, digits):
    mlflow.put(mlflow.folders[digits, "1"] + "/attestations/evaluation.sig", b"{1}")
    registry = open_registry(mlflow.url)
    model = registry.resolve(ModelRef(f"{digits}:1"))
    assert registry.attestations(model) == {"evaluation": b"{1}"}
    assert "attestations/evaluation.sig" not in registry.files(model)
