import socket
import ssl
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from ztserve import ModelRef, TensorSpec, ZTDeployment, transport
from ztserve.errors import ConfigError, Denied, InvalidInput, VerificationError
from ztserve.identity import SpiffeId
from ztserve.testing import serve

X = (TensorSpec("x", "FP32", (-1, 2), low=0, high=10),)
Y = (TensorSpec("y", "FP32", (-1, 2)),)
ONES = {"x": np.ones((1, 2), np.float32)}


class Double(ZTDeployment):
    model = ModelRef("double@production")
    inputs, outputs = X, Y

    def __init__(self, plus=0.0):
        self.plus = plus

    def load(self, model):
        self.factor = dict(model.tensors())["w"]

    def predict(self, x):
        return x * self.factor + self.plus


class Parts(ZTDeployment):
    model = {"left": ModelRef("left:1"), "right": ModelRef("right:1")}  # noqa: RUF012
    inputs, outputs = X, Y

    def load(self, model):
        self.sum = sum(dict(part.tensors())["w"] for part in model.values())

    def predict(self, x):
        return x * self.sum


class Weightless(ZTDeployment):
    inputs, outputs = X, Y

    def predict(self, x):
        return x


def saved(folder, value):
    folder.mkdir()
    save_file({"w": np.full(2, value, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def two(tmp_path):
    return saved(tmp_path / "two", 2)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What is imported is not counted: torch alone takes seconds."""
    with serve(Weightless) as served:
        served.client.infer(ONES)


def test_a_deployment_is_up_in_two_seconds_and_answers_its_client(two):
    began = time.monotonic()
    with serve(Double, model=two) as served:
        answer = served.client.infer({"x": [[1, 2], [3, 4]]})
        assert time.monotonic() - began < 2
        assert answer["y"].tolist() == [[2, 4], [6, 8]]
        domain = "spiffe://dev.ztserve.internal"
        assert served.server_id == f"{domain}/ns/ml-inference/sa/double"
    assert time.monotonic() - began < 6


def test_each_call_is_in_the_records(two):
    with serve(Double, model=two) as served:
        served.client.infer(ONES)
        calls = [r for r in served.records() if r["class_uid"] == 6003]
        assert [r["status"] for r in calls] == ["released"]
        assert calls[0]["actor"]["user"]["uid"].endswith("/ns/dev/sa/cli")
        model = calls[0]["unmapped"]["model"]
        assert (model["name"], model["version"]) == ("double", "0")
        assert served.replica.description.digest == model["digest"]
        kinds = [r.get("activity_name") for r in served.records()]
        assert kinds[:3] == ["log-opened", "model-verified", "replica-started"]


def connected(address):
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_the_address_speaks_mutual_tls_and_nothing_else(two):
    anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    anyone.set_alpn_protocols(["h2"])
    with serve(Double, model=two) as served:
        assert served.address.startswith("127.0.0.1:")
        with connected(served.address) as plain:
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            assert answer_to(plain)[:1] in (b"", b"\x15")  # at most a TLS alert
        with anyone.wrap_socket(connected(served.address)) as tls:
            assert tls.version() == "TLSv1.3"
            assert answer_to(tls) == b""  # TLS 1.3 tells of a lacking certificate late


def answer_to(connection):
    try:
        return connection.recv(64)
    except (ConnectionResetError, ssl.SSLError):
        return b""


def client_as(served, spiffe_id):
    return transport.Client(
        served.address,
        source=served.authority.source(spiffe_id),
        server_id=served.server_id,
    )


def test_only_the_client_is_let_in_by_default(two):
    other = SpiffeId.parse("spiffe://dev.ztserve.internal/ns/dev/sa/other")
    with (
        serve(Double, model=two) as served,
        client_as(served, other) as client,
        pytest.raises(Denied),
    ):
        client.infer(ONES)


def test_policies_of_ones_own_are_enforced(two, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: other, namespace: ml-inference}
spec:
  rules:
    - from:
        - source:
            principals: ["cluster.local/ns/dev/sa/other"]
""")
    policy.chmod(0o600)
    other = "spiffe://dev.ztserve.internal/ns/dev/sa/other"
    with serve(Double, model=two, policies=(policy,)) as served:
        with client_as(served, other) as client:
            assert client.infer(ONES)["y"].tolist() == [[2, 2]]
        with pytest.raises(Denied):
            served.client.infer(ONES)


def test_tables_are_those_of_ztserve_toml(two):
    tables = {
        "validation": {"max_rows": 1},
        "identity": {"trust_domain": "td.example", "namespace": "elsewhere"},
        "transport": {"max_call_s": 5},
    }
    with serve(Double, model=two, tables=tables) as served:
        assert served.server_id == "spiffe://td.example/ns/elsewhere/sa/double"
        with pytest.raises(InvalidInput, match="at most 1 rows"):
            served.client.infer({"x": np.ones((2, 2), np.float32)})
        assert served.client.infer(ONES)
    with (
        pytest.raises(ConfigError, match="'max_roes' is not a known key"),
        serve(Double, model=two, tables={"validation": {"max_roes": 1}}),
    ):
        raise AssertionError


def test_arguments_go_to_the_constructor(two):
    with serve(Double, model=two, args=(1,)) as served:
        assert served.client.infer(ONES)["y"].tolist() == [[3, 3]]
    with serve(Double, model=two, kwargs={"plus": 2}) as served:
        assert served.client.infer(ONES)["y"].tolist() == [[4, 4]]


def test_a_model_of_several_parts_takes_a_directory_for_each(two, tmp_path):
    three = saved(tmp_path / "three", 3)
    with serve(Parts, model={"left": two, "right": three}) as served:
        assert served.client.infer(ONES)["y"].tolist() == [[5, 5]]
    with (
        pytest.raises(ConfigError, match="no directory for 'right'"),
        serve(Parts, model={"left": two}),
    ):
        raise AssertionError


def test_a_model_that_is_not_there_is_said_so(two, tmp_path):
    nowhere = tmp_path / "nowhere"
    with (
        pytest.raises(ConfigError, match=r"nowhere'\): no such directory"),
        serve(Double, model=nowhere),
    ):
        raise AssertionError
    with (
        pytest.raises(ConfigError, match=r"pass serve.*with its weights"),
        serve(Double),
    ):
        raise AssertionError


def test_what_could_not_be_served_is_refused(two):
    (two / "model.pkl").write_bytes(b"\x80\x04.")
    with (
        pytest.raises(VerificationError, match=r"model\.pkl"),
        serve(Double, model=two),
    ):
        raise AssertionError


def test_the_models_directory_is_left_as_it_was(two):
    before = {path.name: path.read_bytes() for path in two.iterdir()}
    with serve(Double, model=two):
        pass
    assert {path.name: path.read_bytes() for path in two.iterdir()} == before


def test_nothing_is_left_behind_when_the_block_ends(two):
    with serve(Double, model=two) as served:
        log, address = served.audit, served.address
        assert log.is_file()
    assert not log.parent.exists()
    with pytest.raises(ConnectionRefusedError):
        connected(address)


def test_a_constructor_that_fails_is_the_tests_to_see(two):
    class Broken(Double):
        def load(self, model):
            raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"), serve(Broken, model=two):
        raise AssertionError
