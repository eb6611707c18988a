"""Against the registry that Debian packages (docker-registry): push, then verify."""

import hashlib
import json
import urllib.request

import pytest

from tests.unit.artifacts.real import free_port, program, running
from ztserve.artifacts import Access, RegistryUrl, open_registry, verify_model
from ztserve.artifacts.publish import publish, push
from ztserve.errors import RegistryError
from ztserve.types import ModelRef

pytestmark = pytest.mark.slow

PUSHER = Access(username="pusher", password="let-me-in")
HTPASSWD = "pusher:$2b$04$IJ50VoAu1q.vtI/aVGpXjuCibaX5IpTX5of82tobKxAwQpf06UOSy\n"
CONFIG = """
version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: {folder}/storage}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}", secret: of-this-test}}
"""
AUTH = "auth: {{htpasswd: {{realm: models, path: {folder}/htpasswd}}}}\n"


@pytest.fixture
def start(tmp_path_factory):
    """Start a registry; with `auth`, only `PUSHER` may do anything."""
    folder, held = tmp_path_factory.mktemp("registry"), []

    def started(*, auth=False):
        port = free_port()
        (folder / "htpasswd").write_text(HTPASSWD)
        text = (CONFIG + (AUTH if auth else "")).format(folder=folder, port=port)
        (folder / "registry.yml").write_text(text)
        command = [program("docker-registry", "DOCKER_REGISTRY"), "serve"]
        running_now = running(
            [*command, "registry.yml"],
            folder,
            f"http://127.0.0.1:{port}/v2/",
            wait_s=10,
        )
        running_now.__enter__()
        held.append(running_now)
        return RegistryUrl.parse(f"oci+http://127.0.0.1:{port}/team/models")

    yield started
    for one in held:
        one.__exit__(None, None, None)


def test_what_is_pushed_is_verified_by_all_its_names(workshop, start):
    url = start()
    files = {"empty.txt": b"", "vocab.txt": bytes(3 << 20)}
    one = workshop.published("one", version="1", files=files)
    two = workshop.published("two", version="2", fill=2.0)
    assert push(workshop.registry, "digits:2", url, Access(), aliases=["best"]) == two
    assert push(workshop.registry, "digits:1", url, Access()) == one  # not the newest
    for ref, expected in {
        "digits": two,
        "digits:1": one,
        "digits:2": two,
        "digits@best": two,
        f"digits@{one.digest}": one,
        f"digits:1@{one.digest}": one,
    }.items():
        model = verify_model(str(url), ref, workshop.trust)
        assert (model.version, model.digest) == (expected.version, expected.digest)
        assert set(model.names) >= {"config.json", "model.safetensors"}
    assert open_registry(url).attestations(one) == {}


def test_a_push_again_moves_aliases_and_nothing_else(workshop, start):
    url = start()
    for version in "12":
        workshop.published(version, version=version, fill=float(version))
        push(workshop.registry, f"digits:{version}", url, Access(), aliases=["best"])
    registry = open_registry(url)
    assert registry.resolve(ModelRef("digits@best")).version == "2"
    push(workshop.registry, "digits:1", url, Access(), aliases=["best"])
    assert registry.resolve(ModelRef("digits@best")).version == "1"
    assert registry.resolve(ModelRef("digits")).version == "2"


def test_a_version_that_is_there_with_other_content_is_refused(workshop, start):
    url = start()
    workshop.published()
    push(workshop.registry, "digits:1", url, Access())
    workshop.registry = workshop.path / "elsewhere"
    workshop.published("other", fill=2.0)
    with pytest.raises(RegistryError, match="already, with other content"):
        push(workshop.registry, "digits:1", url, Access())


def test_bundles_that_refer_to_the_model_are_pushed_with_it(workshop, start):
    url = start()
    model = workshop.published()
    attach(workshop, b'{"bundle": 1}')
    push(workshop.registry, "digits:1", url, Access())
    assert open_registry(url).attestations(model) == {"evaluation": b'{"bundle": 1}'}


def test_a_model_pushed_again_has_what_was_published_last(workshop, start):
    """Also where it was not released anew: the image tells its attestations."""
    url = start()
    root = workshop.signed()
    for kept in (["evaluation", "removed"], ["evaluation"], []):
        for old in (root / "attestations").glob("*.sig"):
            old.unlink()
        bundles = {name: workshop.evaluate(root, name=name) for name in kept}
        publish(root, workshop.registry, name="digits", version="1")
        model = push(workshop.registry, "digits:1", url, Access())
        assert open_registry(url).attestations(model) == {
            name: path.read_bytes() for name, path in bundles.items()
        }


def test_credentials_are_sent_where_they_are_asked_for(workshop, start):
    url = start(auth=True)
    workshop.published(files={"vocab.txt": bytes(3 << 20)})
    with pytest.raises(RegistryError, match=r"asks for credentials \(401\)"):
        push(workshop.registry, "digits:1", url, Access())
    push(workshop.registry, "digits:1", url, PUSHER)
    with pytest.raises(RegistryError, match=r"asks for credentials \(401\)"):
        open_registry(url).resolve(ModelRef("digits"))
    wrong = Access(username="pusher", password="guess")
    with pytest.raises(RegistryError, match="401: the credentials do not count"):
        open_registry(url, wrong).resolve(ModelRef("digits"))
    assert verify_model(open_registry(url, PUSHER), "digits", workshop.trust)


def test_the_server_writes_where_it_is_asked_to(workshop, start):
    # What a reader that could write would do: here it works, without credentials.
    url = start()
    workshop.published()
    push(workshop.registry, "digits:1", url, Access())
    place = f"http://{url.origin.authority}/v2/team/models/digits/manifests/_best"
    kind = "application/vnd.oci.image.manifest.v1+json"
    asked = urllib.request.Request(place.replace("_best", "1"))
    asked.add_header("Accept", kind)
    with urllib.request.urlopen(asked, timeout=5) as found:
        image = found.read()
    request = urllib.request.Request(place, image, method="PUT")
    request.add_header("Content-Type", kind)
    with urllib.request.urlopen(request, timeout=5) as put:
        assert put.status == 201
    assert open_registry(url).resolve(ModelRef("digits@best")).version == "1"


def attach(workshop, content):
    """List a bundle in the layout as a referrer of its newest model."""
    path = workshop.registry / "index.json"
    index = json.loads(path.read_bytes())
    image = index["manifests"][-1]

    def put(raw):
        digest = hashlib.sha256(raw).hexdigest()
        (workshop.registry / "blobs/sha256" / digest).write_bytes(raw)
        return {"digest": f"sha256:{digest}", "size": len(raw)}

    bundle = "application/vnd.dev.sigstore.bundle.v0.3+json"
    title = {"org.opencontainers.image.title": "attestations/evaluation.sig"}
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", **put(b"{}")}
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": bundle,
        "config": empty,
        "layers": [{"mediaType": bundle, **put(content), "annotations": title}],
        "subject": {k: image[k] for k in ("mediaType", "digest", "size")},
    }
    index["manifests"].append(
        {**put(json.dumps(manifest).encode()), "artifactType": bundle}
    )
    path.write_text(json.dumps(index))
