import gc
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save, save_file

from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import release_model, sign_model
from ztserve.errors import VerificationError


@pytest.fixture
def load(workshop):
    def verified(tensors=None, raw=None, **model):
        root = workshop.model(**model)
        if tensors is not None:
            save_file(tensors, root / "model.safetensors")
        if raw is not None:
            (root / "model.safetensors").write_bytes(raw)
        sign_model(root, workshop.keys["trainer"])
        release_model(root, workshop.keys["deployer"], name="digits", version="1")
        return verify_model(root, "digits", workshop.trust)

    return verified


@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "float16", "int64", "uint16", "bool", "float8_e4m3fn"],
)
def test_tensors_come_back_as_they_were_saved(load, dtype):
    saved = torch.arange(6).reshape(2, 3).remainder(2).to(getattr(torch, dtype))
    got = dict(load({"t": saved}).tensors())["t"]
    assert got.dtype == saved.dtype
    assert torch.equal(got.to(torch.float32), saved.to(torch.float32))


def test_scalars_and_empty_tensors_come_back(load):
    got = dict(load({"s": torch.tensor(2.5), "e": torch.empty(0, 3)}).tensors())
    assert got["s"].item() == 2.5
    assert got["e"].shape == (0, 3)


def test_data_that_an_odd_header_length_leaves_unaligned_is_still_read(load):
    content = save({"t": torch.arange(3.0)})
    length = int.from_bytes(content[:8], "little")
    odd = struct.pack("<Q", length + 1) + content[8 : 8 + length] + b" "
    got = dict(load(raw=odd + content[8 + length :]).tensors())["t"]
    assert got.tolist() == [0.0, 1.0, 2.0]
    assert got.data_ptr() % 4 == 0


def test_a_prefix_chooses_tensors_and_a_device_moves_them(load):
    model = load()
    assert [n for n, _ in model.tensors(prefix="layer.b")] == ["layer.bias"]
    assert next(model.tensors(device="meta"))[1].device.type == "meta"


@pytest.mark.slow
def test_tensors_outlive_the_model_they_came_from(load):
    model = load(fill=5.0)
    weights = dict(model.tensors())
    del model
    gc.collect()
    assert weights["layer.weight"].sum().item() == 80


def test_signed_files_are_read_by_name_and_no_others(load):
    model = load(files={"labels/names.txt": b"cat"})
    assert model.read("labels/names.txt") == b"cat"
    for name in ("../trust.toml", "labels", "/etc/passwd"):
        with pytest.raises(VerificationError, match=r"no signed file .*it has config"):
            model.read(name)
    with pytest.raises(VerificationError, match=r"holds weights: use tensors\(\)"):
        model.read("model.safetensors")


def test_the_directory_is_private_read_only_and_without_weights(load):
    model = load(files={"labels/names.txt": b"cat"})
    path = model.directory()
    assert model.directory() == path
    files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    assert files == ["config.json", "labels/names.txt"]
    modes = {p.stat().st_mode & 0o777 for p in (path, path / "labels")}
    assert modes == {0o500}
    assert (path / "labels/names.txt").stat().st_mode & 0o777 == 0o400
    assert path.stat().st_uid == os.geteuid()


@pytest.mark.slow
def test_the_directory_goes_with_the_model(load):
    model = load()
    path = model.directory()
    del model
    gc.collect()
    assert not path.exists()


def test_a_verified_model_does_not_travel(load):
    with pytest.raises(TypeError, match="does not travel between processes"):
        pickle.dumps(load())


def test_it_says_what_it_is(load):
    model = load()
    assert repr(model) == f"VerifiedModel(digits:1@{model.digest})"
