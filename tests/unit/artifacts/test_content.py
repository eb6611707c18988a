import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from ztserve.artifacts.loading.content import check_contents, check_suffixes
from ztserve.errors import VerificationError


def made(writer):
    buffer = io.BytesIO()
    writer(buffer)
    return buffer.getvalue()


def zipped(buffer):
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", "y")


def tarred(buffer):
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.pt", "a pickle"),
        ("pytorch_model.bin", "a pickle"),
        ("sub/Model.PKL", "a pickle"),
        ("weights.npz", "a pickle"),
        ("model.tar.gz", "an archive"),
        ("modeling_digits.py", "code"),
        ("kernel.so", "code"),
        ("modeling.py.", "code"),
        ("setup.SH ", "code"),
        ("model.onnx", "a foreign format"),
        ("model.gguf", "a foreign format"),
    ],
)
def test_a_suffix_that_cannot_be_served_is_refused(name, kind):
    with pytest.raises(VerificationError, match=f"{name} is {kind} .suffix"):
        check_suffixes(["config.json", name])


def test_the_reason_says_what_to_do():
    with pytest.raises(VerificationError) as caught:
        check_suffixes(["model.pt"])
    assert str(caught.value) == (
        "model.pt is a pickle (suffix .pt): ztserve serves only safetensors; convert "
        "it with safetensors.torch.save_file and sign again"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x04\x95rest", r"a pickle \(pickle magic\)"),
        (made(zipped), r"a pickle \(zip magic\)"),
        (made(tarred), r"an archive \(tar magic\)"),
        (made(lambda b: np.save(b, np.zeros(2))), r"a pickle \(numpy magic\)"),
        (b"\x1f\x8b\x08", r"an archive \(gzip magic\)"),
        (b"\x7fELF\x02", r"code \(ELF magic\)"),
        (b"#!/bin/sh", r"code \(script magic\)"),
        (b"\x89HDF\r\n\x1a\n", r"a foreign format \(HDF5 magic\)"),
        (b"GGUF\x03", r"a foreign format \(GGUF magic\)"),
    ],
)
def test_first_bytes_that_cannot_be_served_are_refused(content, message):
    with pytest.raises(VerificationError, match=r"data.txt is " + message):
        check_contents({"data.txt": memoryview(content)})


class Called:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "before", [b"", b"N0", b"I0x1\n0", b"](N0a0", b"N.", b"\x80\0"]
)
def test_a_pickle_is_known_by_what_it_would_do(before, protocol):
    content = before + pickle.dumps([Called()], protocol) + b"\xff rest"
    with pytest.raises(VerificationError, match=r"data.txt is a pickle \(pickle "):
        check_contents({"data.txt": memoryview(content)})


@pytest.mark.parametrize(
    "content",
    [
        b"cposix\nsystem\n(S'id'\ntR",
        b"(cposix\nsystem\nS'id'\no",
        b"(S'id'\niposix\nsystem\n",
        b"cposix\nsystem\n}b",
        b"N0" * (1 << 16),  # to tire whoever looks for the end
    ],
)
def test_a_pickle_written_by_hand_is_refused(content):
    with pytest.raises(VerificationError, match=r"is a pickle \(pickle opcodes\)"):
        check_contents({"data.txt": memoryview(content)})


@pytest.mark.parametrize(
    "text",
    [
        b"cat\ndog\nbus\nRed\n",  # an import of "at", says a pickle, and no more
        b"isympy\nsympy\n",
        b"(c) 2024 Somebody\nAll rights\nin this\nfile\n",
        b"(iris setosa)\nI. setosa\nR",
        b"I like it.\n",
        b"0\n1\n2\n",
        b".",
        b"X\xff\xff\xff\x7f",
        b"V" + b"x" * 10_000,
    ],
)
def test_text_that_begins_like_a_pickle_passes(text):
    assert check_contents({"labels.txt": memoryview(text)}) == {}


def test_plain_data_of_any_other_kind_passes():
    files = {"vocab.txt": b"a\nb", "merges.txt": b"#version: 0.2", "empty": b""}
    assert check_contents({n: memoryview(c) for n, c in files.items()}) == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b'{"auto_map": {}}', "asks for code by 'auto_map'"),
        (b'{"x": [{"trust_remote_code": true}]}', "by 'trust_remote_code'"),
        (b'{"custom_pipelines": {}}', "by 'custom_pipelines'"),
        (b"not json", "not JSON"),
        (b'{"a": 1, "a": 2}', "duplicate JSON key"),
    ],
)
def test_a_configuration_that_would_fetch_code_is_refused(config, message):
    with pytest.raises(VerificationError, match=r"tokenizer_config.json.*" + message):
        check_contents({"tokenizer_config.json": memoryview(config)})


@pytest.mark.parametrize(
    "name",
    ["config.4.0.0.json", "sub/Config.JSON", "config_sentence_transformers.json"],
)
def test_a_configuration_under_another_name_is_looked_into(name):
    with pytest.raises(VerificationError, match="asks for code by 'auto_map'"):
        check_contents({name: memoryview(b'{"auto_map": {}}')})


def test_a_configuration_nested_deeply_is_searched_to_the_bottom():
    deep = b"[" * 900 + b'{"auto_map": 1}' + b"]" * 900
    with pytest.raises(VerificationError, match="asks for code by 'auto_map'"):
        check_contents({"config.json": memoryview(b'{"a":' + deep + b"}")})


def test_a_configuration_that_declines_remote_code_passes():
    check_contents({"config.json": memoryview(b'{"trust_remote_code": false}')})
