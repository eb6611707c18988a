"""The verbs that ask the node's agent who this process is."""

import json
import os
import stat
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.unit.cli.support import Doors
from ztserve import ModelRef, TensorSpec, TextSpec, ZTDeployment, config, errors
from ztserve.cli import predict
from ztserve.errors import InvalidInput
from ztserve.identity import Agent, Authority, Rules, dns_name, is_dumpable

CLI = "spiffe://dev.ztserve.internal/ns/dev/sa/cli"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# --- svid ---------------------------------------------------------------------------


def test_svid_write_gives_a_stock_client_what_it_needs(ztserve, project, agent):
    done = ztserve("svid", "write", "out")
    assert (done.code, done.err) == (0, "")
    folder = project / "out"
    assert mode(folder) == 0o700
    assert {p.name: mode(p) for p in folder.iterdir()} == dict.fromkeys(
        ("svid.pem", "key.pem", "bundle.pem"), 0o600
    )
    leaf = x509.load_pem_x509_certificates((folder / "svid.pem").read_bytes())[0]
    key = load_pem_private_key((folder / "key.pem").read_bytes(), None)
    assert leaf.public_key() == key.public_key()
    (root,) = x509.load_pem_x509_certificates((folder / "bundle.pem").read_bytes())
    leaf.verify_directly_issued_by(root)
    server = "spiffe://dev.ztserve.internal/ns/ml-inference/sa/inference-service"
    assert f"identity              {CLI}, until " in done.out
    assert f"ssl_target_name_override  {dns_name(server)}\n" in done.out


def test_svid_write_names_another_server(ztserve, project, agent):
    done = ztserve("svid", "write", "out", "--server", "ml-api/api-gateway")
    assert "spiffe://dev.ztserve.internal/ns/ml-api/sa/api-gateway\n" in done.out


def test_svid_write_writes_no_key_of_another_identity(ztserve, project):
    settings = config.load()
    domain = settings.identity.trust_domain
    directory = settings.directory_id
    rules = Rules(trust_domain=domain, default_id=directory)
    with Agent(Authority(domain), config.agent_directory(settings), rules):
        done = ztserve("svid", "write", "out")
    assert done.code == 2
    assert f"given {directory} and not {CLI}: that key is not yours" in done.err
    assert not (project / "out").exists()


def test_a_key_that_lay_open_is_replaced_not_written_into(ztserve, project, agent):
    (project / "out").mkdir()
    old = project / "out/key.pem"
    old.write_text("old")
    old.chmod(0o666)
    with old.open() as reader:
        assert ztserve("svid", "write", "out").code == 0
        assert reader.read() == "old"
    assert mode(old) == 0o600
    (project / "out/svid.pem").unlink()
    (project / "out/svid.pem").symlink_to(project / "victim")
    assert ztserve("svid", "write", "out").code == 0
    assert not (project / "victim").exists()


def test_without_an_agent_it_says_so(ztserve, project):
    toml = project / "ztserve.toml"
    text = toml.read_text().replace("[identity]  ", "[identity]\nwait_s = 0.2 #")
    toml.write_text(text)
    assert config.load().identity.wait_s == 0.2
    done = ztserve("svid", "write", "out")
    assert done.code == 2
    assert "nothing is running for the project" in done.err
    assert not (project / "out").exists()
    config.agent_directory(config.load()).rmdir()  # empty, and under /tmp


def test_a_process_that_holds_a_key_is_closed_to_others(ztserve, project, agent):
    ztserve("svid", "write", "out")
    assert not is_dumpable()


# --- agent --------------------------------------------------------------------------


def test_agent_status_tells_whom_it_serves(ztserve, project, agent):
    assert ztserve("svid", "write", "out").code == 0
    told = json.loads(ztserve("agent", "status", "--json").out)
    assert told["trust_domain"] == "dev.ztserve.internal"
    assert told["pid"] == os.getpid()
    assert told["registrations"] == [{"pid": os.getpid(), "id": CLI}]
    plain = ztserve("agent", "status")
    assert "trust_domain\tdev.ztserve.internal\n" in plain.out


def test_an_agent_that_ends_with_its_process_is_not_stopped(ztserve, project, agent):
    done = ztserve("agent", "stop")
    assert done.code == 2
    assert "ends with the process that started it" in done.err


# --- predict ------------------------------------------------------------------------


class Double(ZTDeployment):
    model = ModelRef("double@production")
    service = "double"
    inputs = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs = (TensorSpec("y", "FP32", (-1, 2)),)

    def load(self, model):
        self.factor = next(model.tensors())[1][0]

    def predict(self, x):
        return x * self.factor


class Words(ZTDeployment):
    inputs = (TextSpec("prompt"),)
    outputs = (TextSpec("text"),)

    def predict(self, prompt):
        for word in prompt.split():
            yield word + " "
        yield "\x1b[2J"


@pytest.fixture
def doors(project, published, agent) -> Iterator[Doors]:
    with Doors(project, agent._authority) as doors:
        yield doors


def test_predict_finds_the_deployment_and_prints_the_answer(ztserve, doors):
    doors.serve(Double)
    done = ztserve("predict", "double", "--input", "x=[[1, 2], [3, 4.5]]")
    assert done.code == 0
    assert json.loads(done.out) == {"y": [[2, 4], [6, 9]]}
    assert done.err == f"as {CLI}\n"
    again = ztserve("predict", "ml-inference/double", "--input", "x=[[1, 2]]")
    assert json.loads(again.out) == {"y": [[2, 4]]}


def test_predict_can_make_up_an_input(ztserve, doors):
    doors.serve(Double)
    done = ztserve("predict", "double", "--example")
    assert json.loads(done.out) == {"y": [[0, 0]]}


def test_predict_reads_an_input_from_a_file(ztserve, doors, project):
    doors.serve(Double)
    (project / "x.json").write_text(" [[1, 1]]\n")
    done = ztserve("predict", "double", "--input", "x=@x.json", "--json")
    assert json.loads(done.out) == {"y": [[2, 2]]}


def test_predict_tells_the_servers_refusal_in_one_sentence(ztserve, doors):
    doors.serve(Double)
    done = ztserve("predict", "double", "--input", "x=[[1, 2, 3]]")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"as {CLI}\nztserve predict: ")
    assert "input 'x': expected shape [-1, 2], got [1, 3]" in done.err


@pytest.mark.slow
def test_predict_streams_tensors_piece_by_piece(ztserve, doors):
    doors.serve(Double)
    done = ztserve("predict", "double", "--stream", "--input", "x=[[1, 2]]")
    assert json.loads(done.out) == {"y": [[2, 4]]}


@pytest.mark.slow
def test_predict_streams_text_that_cannot_drive_the_terminal(ztserve, doors):
    doors.serve(Words)
    words = ("predict", "words", "--stream", "--input", "prompt=1 two 3")
    assert ztserve(*words).out == "1 two 3 \ufffd[2J\n"
    lines = ztserve(*words, "--json").out.splitlines()
    pieces = [json.loads(line) for line in lines if line]
    assert "".join(piece["text"] for piece in pieces) == "1 two 3 \x1b[2J"


@pytest.mark.slow
def test_predict_waits_no_longer_than_it_is_told(ztserve, doors):
    began = time.monotonic()
    done = ztserve("predict", "nobody", "--input", "x=[[1]]", "--timeout-s", "0.3")
    assert done.code == 2
    assert "ztserve predict: " in done.err
    assert time.monotonic() - began < 3


def test_predict_says_at_once_that_the_directory_refuses(ztserve, doors, monkeypatch):
    def watch(_call, _deployment):
        raise errors.Denied("not for you")
        yield

    monkeypatch.setattr(doors, "watch", watch)
    began = time.monotonic()
    done = ztserve("predict", "double", "--input", "x=[[1, 2]]")
    assert (done.code, done.out) == (2, "")
    assert "not for you" in done.err
    assert time.monotonic() - began < 3


def test_a_stock_client_is_answered_with_the_files_and_not_without(
    ztserve, doors, project
):
    address = doors.serve(Double)
    words = ("svid", "write", "out", "--server", "double")
    override = ztserve(*words).out.rpartition("override")[2].strip()
    pem = {p.stem: p.read_bytes() for p in (project / "out").iterdir()}
    options = (("grpc.ssl_target_name_override", override),)
    path = "/inference.GRPCInferenceService/ServerReady"

    def ask(credentials):
        with grpc.secure_channel(address, credentials, options) as channel:
            return channel.unary_unary(path)(b"", timeout=5)

    mine = grpc.ssl_channel_credentials(pem["bundle"], pem["key"], pem["svid"])
    assert ask(mine) == b"\x08\x01"
    with pytest.raises(grpc.RpcError):
        ask(grpc.ssl_channel_credentials(pem["bundle"]))


# --- inputs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("a=[[1, 2]]", [[1, 2]]),
        ("a= [1]", [1]),
        ("a=42", "42"),
        ("a=2024 was long ago", "2024 was long ago"),
        ("a=[INST] hello", "[INST] hello"),
        ("a=" + "[" * 100_000, "[" * 100_000),
        ("a=", ""),
        ("a=x=y", "x=y"),
    ],
)
def test_an_input_is_a_list_or_a_text(pair, value):
    assert predict.parsed([pair]) == {"a": value}


def test_an_input_that_is_none_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match="expected name=value"):
        predict.parsed(["pixels"])
    file = tmp_path / "file"
    file.write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match="not UTF-8 at byte 0"):
        predict.parsed([f"a=@{file}"])
    monkeypatch.setattr(predict, "MAX_INPUT_BYTES", 10)
    file.write_bytes(b"[" + b"1," * 10 + b"1]")
    with pytest.raises(InvalidInput, match="larger than 10 bytes"):
        predict.parsed([f"a=@{file}"])


def test_an_answer_is_printable_as_json():
    assert predict.plain(np.ones((1, 2), np.float32)) == [[1.0, 1.0]]
    assert predict.plain("text") == "text"
