import json
import os

import numpy as np
import pytest
from safetensors.numpy import save

from ztserve.artifacts.loading.content import check_contents
from ztserve.errors import VerificationError

WEIGHTS = save({"a": np.ones(2, np.float32)})


def check(files):
    return check_contents({name: memoryview(text) for name, text in files.items()})


def config(**fields):
    return json.dumps(fields).encode()


FIELDS = ["_name_or_path", "name_or_path", "base_model_name_or_path"]
ELSEWHERE = [
    "/home/trainer/llama",
    "./llama",
    "../llama",
    "~/llama",
    "a/../../b",
    "owner/..",
    "owner/name/more",
    "owner/name@main",
    "https://huggingface.co/owner/name",
    "s3://bucket/llama",
    "C:\\llama",
    "\\\\host\\share",
    "owner/na\u043ce",
    "x" * 97,
    ["owner/name"],
    {"path": "owner/name"},
    7,
    False,
]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", ELSEWHERE, ids=str)
def test_a_configuration_that_points_out_of_the_model_is_refused(field, value):
    with pytest.raises(VerificationError, match=r"model_index.json points out of the"):
        check({"model_index.json": config(**{field: value})})
    files = {"adapter_config.json": config(deep=[{field: value}])}
    with pytest.raises(VerificationError) as caught:
        check(files)
    assert str(caught.value) == (
        f"adapter_config.json points out of the model: {field!r} is {str(value)!r}, "
        "expected a file or folder of the model, or owner/name as a note of its "
        "origin; remove the field and sign again"
    )


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "value", [None, "", ".", "llama", "owner/name-7B.v1_x", "sub", "sub/base/x.json"]
)
def test_a_note_of_origin_and_what_is_in_the_model_may_be_named(field, value):
    files = {"config.json": config(**{field: value}), "sub/base/x.json": b"{}"}
    assert check(files) == {}


@pytest.mark.slow
def test_what_transformers_saves_passes(tmp_path):
    """From a local folder, too: it writes no such path (its version 4 did)."""
    transformers = pytest.importorskip("transformers")
    made, again = tmp_path / "made", tmp_path / "again"
    transformers.LlamaConfig(hidden_size=8, num_attention_heads=1).save_pretrained(made)
    loaded = transformers.AutoConfig.from_pretrained(made, local_files_only=True)
    assert loaded.name_or_path == os.fspath(made)
    loaded.save_pretrained(again)
    check({p.name: p.read_bytes() for p in again.iterdir()})


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("folder", ["", "unet/"])
def test_an_index_of_the_weights_beside_it_passes(folder):
    index = config(metadata={"total_size": 8}, weight_map={"a": "x.safetensors"})
    assert check({folder + INDEX: index, folder + "x.safetensors": WEIGHTS})


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (config(weight_map={"a": "../x.safetensors"}), "in '../x.safetensors', which"),
        (config(weight_map={"a": "/x.safetensors"}), "is no weight file of this model"),
        (config(weight_map={"a": "./x.safetensors"}), "is no weight file"),
        (config(weight_map={"a": "y.safetensors"}), "is no weight file of this model"),
        (config(weight_map={"a": "config.json"}), "is no weight file of this model"),
        (config(weight_map={"a": 3}), "in '3', which is no weight file"),
        (config(weight_map={"a": None}), "in 'None', which is no weight file"),
        (config(weight_map={"b": "x.safetensors"}), "'b' in x.safe.*no such tensor"),
        (config(weight_map=[]), "'weight_map' is of kind list, not dict"),
        (config(), "field 'weight_map' is missing"),
        (b"[]", "is not an object"),
        (b"{", "not JSON"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "duplicate JSON key 'a'"),
    ],
)
def test_an_index_that_is_not_of_these_files_is_refused(index, reason):
    files = {INDEX: index, "x.safetensors": WEIGHTS, "config.json": b"{}"}
    with pytest.raises(VerificationError, match=f"{INDEX}.*{reason}"):
        check(files)


def test_an_index_in_a_folder_speaks_of_that_folder():
    index = config(weight_map={"a": "x.safetensors"})
    with pytest.raises(VerificationError, match="is no weight file of this model"):
        check({"sub/" + INDEX: index, "x.safetensors": WEIGHTS})
