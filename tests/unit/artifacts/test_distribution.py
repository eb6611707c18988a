import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.unit.artifacts.servers import LayoutServer, answer, serving
from ztserve.artifacts import open_registry, verify_model
from ztserve.artifacts.publish import publish, release_model, sign_model
from ztserve.artifacts.registry.address import RegistryUrl
from ztserve.artifacts.registry.distribution import DistributionRegistry, repository_of
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.errors import RegistryError, VerificationError
from ztserve.types import ModelRef


@pytest.fixture
def one(workshop):
    return workshop.published("one", version="1")


@pytest.fixture
def server(workshop, one):
    server = LayoutServer(workshop.registry)
    yield server
    server.close()


@pytest.fixture
def registry(server):
    return open_registry(server.url)


def without_layer(server, title):
    """Serve the image manifest without one of its layers; return its digest."""
    raw = server.blob(server.image("digits", "1"))
    image = json.loads(raw)
    image["layers"] = [
        layer
        for layer in image["layers"]
        if layer["annotations"]["org.opencontainers.image.title"] != title
    ]
    digest = server.put(json.dumps(image).encode())
    tagged = server._tagged
    server._tagged = lambda name, tag: (
        tagged(name, tag) if tag.startswith("sha256-") else digest
    )
    return digest


@pytest.mark.slow
def test_a_model_is_verified_from_a_registry_over_http(workshop, server):
    for ref in ("digits", "digits:1", "digits@production"):
        model = verify_model(server.url, ref, workshop.trust)
        assert model.names == ("config.json", "model.safetensors")
    assert {verb for verb, _, _ in server.requests} == {"GET"}


def test_references_are_tags(workshop, server, registry, one):
    two = workshop.published("two", version="2", fill=2.0)
    for ref, expected in {
        "digits:1": one,
        "digits:2": two,
        "digits": two,
        "digits@production": two,
        f"digits@{one.digest}": one,
        f"digits:1@{one.digest}": one,
    }.items():
        assert registry.resolve(ModelRef(ref)) == expected


@pytest.mark.parametrize(
    "ref", ["fraud", "digits:9", "digits@canary", "digits@sha256:" + "0" * 64]
)
def test_what_is_not_there_is_a_registry_error(registry, ref):
    with pytest.raises(
        RegistryError, match=rf"has no {ref}: publish it with .*\(404\)"
    ):
        registry.resolve(ModelRef(ref))


def test_files_are_read_by_ranges_into_the_callers_memory(server, registry, one):
    assert registry.files(one).keys() == {"config.json", "model.safetensors"}
    with registry.open(one, "model.safetensors") as reader:
        memory = memoryview(bytearray(reader.size))
        assert reader.read_into(memory[100:], 100) == reader.size - 100
        assert reader.read_into(memory[:100], 0) == 100
        assert reader.read_into(memory[:100], reader.size) == 0
    layer = json.loads(server.blob(server.image("digits", "1")))["layers"][1]
    assert memory.tobytes() == server.blob(layer["digest"])
    asked = [h["range"] for _, _, h in server.requests if "range" in h]
    assert asked == [f"bytes=100-{reader.size - 1}", "bytes=0-99"]


def test_windows_double_where_a_file_is_read_in_order(server, registry, one):
    with registry.open(one, "model.safetensors") as reader:
        memory = memoryview(bytearray(8))
        for offset in (*range(0, 64, 8), *range(100, 132, 8)):
            assert reader.read_into(memory, offset) == 8
    asked = [h["range"] for _, _, h in server.requests if "range" in h]
    assert asked[:4] == ["bytes=0-7", "bytes=8-15", "bytes=16-31", "bytes=32-63"]
    assert asked[4:] == ["bytes=100-107", "bytes=108-115", "bytes=116-131"]
    assert len(server._open) == 2  # the listener, and one for all, kept


@pytest.mark.parametrize("shard_bytes", [64, 100])
def test_a_model_in_shards_is_verified_by_ranges(workshop, shard_bytes):
    root = workshop.model("sharded")
    how = Serialization("sha256", shard_bytes)
    sign_model(root, workshop.keys["trainer"], serialization=how)
    release_model(root, workshop.keys["deployer"], name="shards", version="1")
    publish(root, workshop.registry, name="shards", version="1")
    with serving(LayoutServer(workshop.registry)) as server:
        assert verify_model(server.url, "shards", workshop.trust).version == "1"


def test_threads_may_share_a_reader(server, registry, one):
    with registry.open(one, "model.safetensors") as reader:
        memory = memoryview(bytearray(reader.size))
        with ThreadPoolExecutor(4) as pool:
            done = pool.map(
                lambda at: reader.read_into(memory[at : at + 8], at),
                range(0, reader.size, 8),
            )
        assert sum(done) == reader.size
    layer = json.loads(server.blob(server.image("digits", "1")))["layers"][1]
    assert memory.tobytes() == server.blob(layer["digest"])


def test_connections_are_kept_and_made_anew_when_the_server_closed_them(
    server, registry, one
):
    assert registry.signature(one) == registry.signature(one)
    for connection in server._open - {server._listener}:
        connection.shutdown(2)
    assert registry.release(one)
    assert len(server._open) <= 4  # the listener, and one or two a phase


def test_a_file_that_the_model_does_not_have_is_refused(registry, one):
    with pytest.raises(VerificationError, match="digits has no file 'x'"):
        registry.open(one, "x")


@pytest.mark.parametrize("api", [True, False], ids=["api", "fallback tag"])
def test_signatures_may_be_referrers(workshop, server, registry, one, api):
    release = registry.release(one)
    image = without_layer(server, "release.sig")
    fresh = open_registry(server.url)
    with pytest.raises(VerificationError, match=r"is not released: neither is rel"):
        fresh.release(one)
    server.api = api
    server.refer(image, "release.sig", release)
    assert fresh.release(one) == release
    assert verify_model(fresh, "digits:1", workshop.trust)
    asked = {target.partition("?")[0] for _, target, _ in server.requests}
    assert f"/v2/models/digits/referrers/{image}" in asked


def test_attestations_are_referrers(server, registry, one):
    assert registry.attestations(one) == {}
    image = server.image("digits", "1")
    server.refer(image, "attestations/evaluation.sig", b"{1}")
    server.refer(image, "other.sig", b"{2}")
    assert registry.attestations(one) == {"evaluation": b"{1}"}
    server.refer(image, "attestations/evaluation.sig", b"{3}")
    with pytest.raises(RegistryError, match=r"two bundles named 'attest.*refer to dig"):
        registry.attestations(one)


def test_more_referrers_than_are_read_are_refused(server, registry, one):
    node = {"digest": "sha256:" + "0" * 64, "artifactType": "x"}
    server.referrers[server.image("digits", "1")] = [node] * 65
    with pytest.raises(RegistryError, match="has 65 entries, the limit is 64"):
        registry.attestations(one)


def test_an_image_that_is_no_model_is_refused(server, registry):
    server.respond = lambda *_: answer(b'{"layers": []}')
    with pytest.raises(RegistryError, match=r"is none of a model's: field 'dev.ztse"):
        registry.resolve(ModelRef("digits"))


@pytest.mark.parametrize("name", ["a..b", "a-", "a._b"])
def test_a_name_that_no_repository_can_have_is_refused(name):
    url = RegistryUrl.parse("oci+https://registry.example/models")
    with pytest.raises(RegistryError, match="is no name of an OCI repository"):
        repository_of(url, name)


@pytest.mark.slow
def test_only_so_many_models_are_remembered(workshop, server, monkeypatch):
    monkeypatch.setattr("ztserve.artifacts.registry.distribution.MAX_REMEMBERED", 1)
    registry = open_registry(server.url)
    assert isinstance(registry, DistributionRegistry)
    fraud = workshop.published("fraud", "fraud")
    for _ in range(2):
        registry.resolve(ModelRef("digits:1"))
        registry.resolve(fraud.ref)
    assert len(registry._images) == len(registry._http) == 1
