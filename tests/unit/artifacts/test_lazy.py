import pytest
import torch
from safetensors.torch import save_file

from ztserve.artifacts import verify_model
from ztserve.artifacts.publish import release_model, sign_model
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.errors import RegistryError, VerificationError

SHARD = 4096
WEIGHTS = {
    f"layer{n}.{kind}": torch.randn(64, 32, generator=torch.Generator().manual_seed(n))
    for n in range(4)
    for kind in ("up", "down")
} | {
    "bias": torch.arange(7, dtype=torch.int64),
    "mask": torch.tensor([True, False] * 3),
    "none": torch.empty(0, 3),
    "one": torch.tensor(2.5, dtype=torch.bfloat16),
}


@pytest.fixture
def load(workshop):
    """Verify a model in two files, lazily unless told otherwise."""

    def verified(*, shard_size=SHARD, lazy=True, **more):
        root = workshop.path / "digits"
        if not root.exists():
            workshop.model()
            names = sorted(WEIGHTS)
            (root / "model.safetensors").unlink()
            for number in range(2):
                half = {name: WEIGHTS[name] for name in names[number::2]}
                save_file(half, root / f"model-{number}.safetensors")
            how = Serialization("sha256", shard_size)
            sign_model(root, workshop.keys["trainer"], serialization=how)
            release_model(root, workshop.keys["deployer"], name="digits", version="1")
        return verify_model(root, "digits", workshop.trust, lazy=lazy, **more)

    return verified


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [64, SHARD, 1 << 20, None])
def test_a_lazy_model_gives_the_same_tensors(load, shard_size):
    model = load(shard_size=shard_size)
    assert model.names == ("config.json", "model-0.safetensors", "model-1.safetensors")
    assert model.shapes == {name: tuple(t.shape) for name, t in WEIGHTS.items()}
    got = dict(model.tensors())
    assert got.keys() == WEIGHTS.keys()
    assert all(
        torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in WEIGHTS.items()
    )
    assert model.unread == 0
    assert model.size == load(lazy=False).size


def test_a_prefix_reads_only_what_it_covers(load):
    model = load()
    before = model.unread
    assert before > 50_000
    names = sorted(name for name, _ in model.tensors(prefix="layer1."))
    assert names == ["layer1.down", "layer1.up"]
    read = before - model.unread
    tensors = 2 * WEIGHTS["layer1.up"].nbytes
    assert tensors <= read + 2 * SHARD  # the header's shards were read before
    assert read <= tensors + 4 * SHARD


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_the_rows_of_all_ranks_are_the_tensor(load, lazy, ranks):
    model = load(lazy=lazy)
    for name, tensor in WEIGHTS.items():
        if tensor.dim():
            n = tensor.shape[0]
            parts = [
                model.rows(name, n * rank // ranks, n * (rank + 1) // ranks)
                for rank in range(ranks)
            ]
            assert torch.equal(torch.cat(parts), tensor)


def test_a_rank_reads_little_more_than_its_rows(load):
    model = load(shard_size=256)
    before = model.unread
    rows = model.rows("layer2.up", 16, 32)
    assert torch.equal(rows, WEIGHTS["layer2.up"][16:32])
    assert rows.nbytes <= before - model.unread <= rows.nbytes + 2 * 256


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [("bias", -1, 2), ("bias", 3, 2), ("bias", 0, 8), ("one", 0, 0), ("none", 0, 1)],
)
def test_rows_that_are_not_there_are_a_mistake_of_the_program(
    load, lazy, name, start, stop
):
    with pytest.raises(ValueError, match=rf"rows {start} to {stop} of a tensor of sha"):
        load(lazy=lazy).rows(name, start, stop)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_tensor_that_is_not_there_is_refused(load, lazy):
    model = load(lazy=lazy)
    for ask in (model.tensor, lambda name: model.rows(name, 0, 1)):
        with pytest.raises(VerificationError, match="digits has no tensor 'x'; it has"):
            ask("x")


@pytest.mark.parametrize("lazy", [False, True])
def test_a_tensor_reaches_no_byte_but_its_own(load, lazy):
    model = load(lazy=lazy)
    for tensor in (model.tensor("layer1.up"), model.rows("layer1.up", 8, 9)):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        with pytest.raises(RuntimeError, match="out of bounds"):
            tensor.as_strided((tensor.numel() + 1,), (1,))


def test_tensors_of_the_same_bytes_share_their_memory(load):
    model = load()
    model.tensor("layer1.up")[8].fill_(5)
    assert model.rows("layer1.up", 8, 9).eq(5).all()


@pytest.mark.parametrize("lazy", [False, True])
def test_a_device_gets_tensors_and_rows(load, lazy):
    model = load(lazy=lazy)
    assert {t.device.type for _, t in model.tensors(device="meta")} == {"meta"}
    assert model.rows("bias", 0, 2, device="meta").device.type == "meta"
    assert model.tensor("bias", "cpu").tolist() == list(range(7))


@pytest.mark.slow
def test_the_tensors_of_a_lazy_model_come_batch_by_batch(load, monkeypatch):
    monkeypatch.setattr("ztserve.artifacts.loading.model._AHEAD", 20_000)
    model = load()
    unread = [model.unread for _ in model.tensors()]
    assert unread[-1] == 0
    assert len(set(unread)) >= 3


def test_other_files_are_whole_and_weights_are_not_read_as_files(load):
    model = load()
    assert model.read("config.json") == b"{}"
    with pytest.raises(VerificationError, match=r"holds weights: use tensors\(\)"):
        model.read("model-0.safetensors")
    assert [path.name for path in model.directory().iterdir()] == ["config.json"]


def test_the_limit_is_of_what_is_read(load):
    everything = sum(t.nbytes for t in WEIGHTS.values())
    with pytest.raises(RegistryError, match="more than the limit of"):
        load(lazy=False, max_bytes=everything // 2)
    model = load(max_bytes=everything // 2)
    assert model.tensor("layer1.up").shape == (64, 32)
    with pytest.raises(RegistryError, match=r"bytes of weights are needed in memory"):
        list(model.tensors())


def test_an_eager_model_has_nothing_unread(load):
    assert load(lazy=False).unread == 0


def test_a_deployer_looks_at_the_whole_model(load):
    with pytest.raises(ValueError, match="purpose 'deploy' cannot be lazy"):
        load(purpose="deploy")
