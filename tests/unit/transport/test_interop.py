"""A stock client of the Open Inference Protocol, from PyPI, against our server."""

import queue

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.unit.transport.support import CLI, SERVER, Served, pem
from ztserve.identity import dns_name


@pytest.fixture
def stock(served: Served, tmp_path):
    svid = served.authority.issue(CLI)
    files = {
        "root_certificates": pem(served.authority.bundle),
        "private_key": svid.key_pem(),
        "certificate_chain": svid.chain_pem(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    client = made(served, **{name: str(tmp_path / name) for name in files})
    yield client
    client.close()


def made(served: Served, **files: str) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(
        served.address,
        ssl=True,
        channel_args=[("grpc.ssl_target_name_override", dns_name(SERVER))],
        **files,
    )


def tensor(name: str, array: np.ndarray) -> triton.InferInput:
    datatype = triton.service_pb2 and {"f": "FP32", "O": "BYTES"}[array.dtype.kind]
    made = triton.InferInput(name, array.shape, datatype)
    made.set_data_from_numpy(array)
    return made


def test_it_infers_tensors_and_texts(stock) -> None:
    floats = np.arange(8, dtype="f4").reshape(2, 4)
    texts = np.array(["grüße".encode(), b""], dtype=object)
    answer = stock.infer(
        "echo", [tensor("x", floats), tensor("t", texts)], request_id="mine"
    )
    assert answer.as_numpy("x").tolist() == floats.tolist()
    assert answer.as_numpy("t").tolist() == texts.tolist()
    assert answer.get_response().id == "mine"
    assert answer.get_response().model_version == "3"


def test_it_streams(served: Served, stock) -> None:
    got: queue.Queue = queue.Queue()
    stock.start_stream(lambda result, error: got.put((result, error)))
    for text in (b"one", b"raise InvalidInput", b"two"):
        texts = np.array([text], dtype=object)
        stock.async_stream_infer("echo", [tensor("t", texts)], request_id="id")
    answers = [got.get(timeout=10) for _ in range(7)]
    stock.stop_stream()
    told = [
        error.message() if error else result.as_numpy("t").tolist()[0]
        for result, error in answers
    ]
    assert told == [b"one"] * 3 + ["the public sentence"] + [b"two"] * 3
    assert len(served.service.calls) == 3


def test_it_asks_for_health_and_metadata(stock) -> None:
    assert stock.is_server_live()
    assert stock.is_server_ready()
    assert stock.is_model_ready("echo")
    assert not _quietly(stock.is_model_ready, "other")
    about = stock.get_model_metadata("echo")
    assert (about.name, list(about.versions)) == ("echo", ["3"])
    assert [(t.name, t.datatype, list(t.shape)) for t in about.inputs] == [
        ("x", "FP32", [-1, 4])
    ]
    assert stock.get_server_metadata().name == "ztserve"


def _quietly(ask, *args) -> bool:
    try:
        return ask(*args)
    except triton.InferenceServerException:
        return False


def test_it_sees_the_public_sentence_of_a_refusal(stock) -> None:
    texts = np.array([b"raise Denied"], dtype=object)
    with pytest.raises(triton.InferenceServerException) as caught:
        stock.infer("echo", [tensor("t", texts)])
    assert caught.value.message() == "the public sentence"
    assert caught.value.status() == "StatusCode.PERMISSION_DENIED"


def test_without_a_certificate_it_gets_nothing(served: Served, tmp_path) -> None:
    root = tmp_path / "root"
    root.write_bytes(pem(served.authority.bundle))
    client = made(served, root_certificates=str(root))
    with pytest.raises(triton.InferenceServerException) as caught:
        client.infer("echo", [tensor("x", np.zeros((1, 4), "f4"))], client_timeout=5)
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    client.close()
    assert served.service.calls == []
    assert served.refusals == []
