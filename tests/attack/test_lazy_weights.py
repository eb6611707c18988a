"""Attacks on weights that are read, and verified, shard by shard when asked for.

Each is refused, and works where its control is off.
"""

import hashlib
import os
import struct
import threading
from contextlib import suppress

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.unit.artifacts.workshop import Workshop
from ztserve.artifacts import open_registry, verify_model
from ztserve.artifacts.loading import loader, shards
from ztserve.artifacts.publish import release_model, sign_model
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.errors import ArtifactError, RegistryError, VerificationError

WEIGHTS = "model.safetensors"
SHARD = 1024
ROWS, COLUMNS = 64, 64


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


@pytest.fixture
def unchecked(monkeypatch):
    """Take the control out: what a shard's digest is, is not looked at."""
    return lambda: monkeypatch.setattr(shards, "check_shard", lambda *_: None)


def signed(workshop, how=Serialization("sha256", SHARD), **files):  # noqa: B008
    """A signed model of two tensors: `a` of zeros, `b` of ones; its directory."""
    root = workshop.model(files=files)
    tensors = {"a": torch.zeros(ROWS, COLUMNS), "b": torch.ones(ROWS, COLUMNS)}
    save_file(tensors, root / WEIGHTS)
    sign_model(root, workshop.keys["trainer"], serialization=how)
    release_model(root, workshop.keys["deployer"], name="digits", version="1")
    return root


def lazily(root, workshop):
    return verify_model(root, "digits", workshop.trust, lazy=True)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def poison(root):
    """Set the last number of the last tensor to 666."""
    with (root / WEIGHTS).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 666))


def test_a_shard_changed_between_header_and_tensor_is_refused(workshop, unchecked):
    root = signed(workshop)
    model = lazily(root, workshop)
    with safe_open(root / WEIGHTS, "pt") as stock:
        poison(root)
        assert stock.get_tensor("b")[-1, -1] == 666  # the stock loader takes it
    with pytest.raises(
        VerificationError,
        match=r"'model.safetensors' was changed after signing: .*bytes \d+ to \d+ is",
    ):
        model.tensor("b")
    with pytest.raises(VerificationError, match="was changed after signing"):
        list(model.tensors())
    with pytest.raises(VerificationError, match="was changed after signing"):
        model.rows("b", ROWS - 1, ROWS)
    assert model.tensor("a").sum() == 0
    unchecked()
    assert model.tensor("b")[-1, -1] == 666


def test_what_is_not_asked_for_is_not_said_to_be_good(workshop):
    root = signed(workshop)
    poison(root)
    with pytest.raises(VerificationError, match="was changed after signing"):
        verify_model(root, "digits", workshop.trust)
    model = lazily(root, workshop)  # the claim: of what is unread nobody says anything
    assert model.rows("b", 0, ROWS // 2).eq(1).all()
    assert 0 < model.unread < 2 * ROWS * COLUMNS * 4
    with pytest.raises(VerificationError, match="was changed after signing"):
        model.rows("b", ROWS // 2, ROWS)
    with pytest.raises(ValueError, match="cannot be lazy"):
        verify_model(root, "digits", workshop.trust, purpose="deploy", lazy=True)


def test_a_changed_header_is_refused_before_there_is_a_model(workshop, unchecked):
    root = signed(workshop)
    content = (root / WEIGHTS).read_bytes()
    swapped = content.replace(b'"a":', b'"x":').replace(b'"b":', b'"a":')
    (root / WEIGHTS).write_bytes(swapped.replace(b'"x":', b'"b":'))
    with pytest.raises(VerificationError, match=r"was changed after signing: .* 0 to"):
        lazily(root, workshop)
    unchecked()
    assert lazily(root, workshop).tensor("a").eq(1).all()  # another tensor's weights


@pytest.mark.parametrize("size", [100, 1 << 20])
def test_a_file_cut_or_grown_between_two_reads_is_refused(workshop, size):
    root = signed(workshop)
    model = lazily(root, workshop)
    os.truncate(root / WEIGHTS, size)
    with pytest.raises(VerificationError, match=f"has {size} bytes where the registry"):
        model.tensor("a")


def test_a_file_that_becomes_a_link_between_two_reads_is_refused(workshop):
    root = signed(workshop)
    model = lazily(root, workshop)
    (root / WEIGHTS).rename(workshop.path / "elsewhere")
    (root / WEIGHTS).symlink_to(workshop.path / "elsewhere")
    with pytest.raises(VerificationError, match="symbolic link or special file"):
        model.tensor("a")


def test_another_signed_model_put_in_its_place_is_refused(workshop, unchecked):
    root = signed(workshop)
    model = lazily(root, workshop)
    save_file(
        {"a": torch.full((ROWS, COLUMNS), 2.0), "b": torch.full((ROWS, COLUMNS), 3.0)},
        root / WEIGHTS,
    )
    how = Serialization("sha256", SHARD)
    sign_model(root, workshop.keys["trainer"], serialization=how)
    release_model(root, workshop.keys["deployer"], name="digits", version="2")
    assert verify_model(root, "digits:2", workshop.trust).tensor("a").eq(2).all()
    with pytest.raises(VerificationError, match="was changed after signing"):
        model.tensor("a")
    unchecked()
    assert model.tensor("a").max() == 2  # two models in one


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"extra.json": b"{}"}, "extra file 'extra.json'"),
        ({"extra.safetensors": b"{}"}, "extra file 'extra.safetensors'"),
    ],
)
def test_the_closed_world_holds_for_a_lazy_model(
    workshop, monkeypatch, content, reason
):
    root = signed(workshop)
    for name, text in content.items():
        (root / name).write_bytes(text)
    with pytest.raises(VerificationError, match=reason):
        lazily(root, workshop)
    (root / "extra.safetensors").unlink(missing_ok=True)
    (root / "extra.json").write_bytes(b'{"evil": 1}')
    monkeypatch.setattr(loader, "check_closed", lambda *_: None)
    assert b"evil" in lazily(root, workshop).read("extra.json")


def test_an_index_of_a_lazy_model_that_names_another_file_is_refused(workshop):
    root = workshop.model()
    names = ["config.json", WEIGHTS, "model.safetensors.index.json"]
    (root / names[2]).write_text('{"weight_map": {"layer.bias": "../x.safetensors"}}')
    workshop.force_sign(root, {n: sha256(root / n) for n in names})
    with pytest.raises(VerificationError, match="which is no weight file of this mod"):
        lazily(root, workshop)


def test_values_that_are_none_are_refused_when_they_are_read(workshop):
    header = b'{"a":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]}}'
    root = workshop.model()
    (root / WEIGHTS).write_bytes(
        struct.pack("<Q", len(header)) + header + b"\x00\x01\x02\x01"
    )
    names = ["config.json", WEIGHTS]
    workshop.force_sign(root, {n: sha256(root / n) for n in names})
    model = lazily(root, workshop)
    assert model.rows("a", 0, 2).tolist() == [False, True]
    with pytest.raises(VerificationError, match="'a' is BOOL but holds other bytes"):
        model.tensor("a")


class Liar:
    """A registry in front of a true one that lies about the size of the weights."""

    def __init__(self, registry, size):
        self._registry, self._size = registry, size

    def __getattr__(self, name):
        return getattr(self._registry, name)

    def files(self, model):
        return {**self._registry.files(model), WEIGHTS: self._size}

    def open(self, model, name):
        reader = self._registry.open(model, name)
        if name == WEIGHTS:
            reader.size = self._size
        return reader


@pytest.mark.parametrize("size", [1 << 42, 1 << 60])
def test_a_lazy_file_that_is_promised_to_be_endless_is_refused(workshop, size):
    liar = Liar(open_registry(signed(workshop, Serialization())), size)
    with pytest.raises(RegistryError, match=r"more than the limit|no memory for a"):
        lazily(liar, workshop)
    for path in (workshop.path / "digits").iterdir():
        path.unlink()
    (workshop.path / "digits").rmdir()
    liar = Liar(open_registry(signed(workshop)), size)
    with pytest.raises(VerificationError, match="its signed shards have"):
        lazily(liar, workshop)


@pytest.mark.slow
@pytest.mark.parametrize("control", [True, False])
def test_a_racing_writer_gets_no_wrong_byte_into_a_lazy_model(
    workshop, unchecked, control
):
    if not control:
        unchecked()
    root = signed(workshop)
    good = (root / WEIGHTS).read_bytes()
    data = 8 + int.from_bytes(good[:8], "little")
    evil = good[:data] + struct.pack("<f", 666) * ((len(good) - data) // 4)
    trust, stop = workshop.trust, threading.Event()

    def write():
        turn = 0
        while not stop.wait(0.0005):
            with (root / WEIGHTS).open("r+b") as file:
                file.write((good, evil)[turn % 2])
            turn += 1

    writer = threading.Thread(target=write)
    writer.start()
    right = wrong = 0
    try:
        for _ in range(100):
            with suppress(ArtifactError):
                model = verify_model(root, "digits", trust, lazy=True)
                for start in range(0, ROWS, 8):
                    with suppress(ArtifactError):
                        rows = model.rows("b", start, start + 8)
                        right, wrong = (
                            right + bool(rows.eq(1).all()),
                            wrong + bool(rows.eq(666).any()),
                        )
    finally:
        stop.set()
        writer.join()
    assert right
    assert bool(wrong) is not control
