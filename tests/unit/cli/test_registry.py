import json

import pytest

from tests.unit.artifacts.real import free_port, program, running
from tests.unit.artifacts.servers import LayoutServer, serving

REGISTRY = """
version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: {folder}/storage}}}}
http: {{addr: "127.0.0.1:{port}", secret: of-this-test}}
"""


@pytest.fixture
def url(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("registry"), free_port()
    command = [program("docker-registry", "DOCKER_REGISTRY"), "serve", "registry.yml"]
    (folder / "registry.yml").write_text(REGISTRY.format(folder=folder, port=port))
    with running(command, folder, f"http://127.0.0.1:{port}/v2/", wait_s=10):
        yield f"oci+http://127.0.0.1:{port}/models"


@pytest.mark.slow
def test_push_then_verify_from_the_server(ztserve, project, published, url):
    done = ztserve("registry", "push", "double:1", "--to", url, "--alias", "best")
    assert done.code == 0, done.err
    assert done.out.startswith("double:1 sha256:")
    told = ztserve("verify", "double@best", "--from", url, "--json")
    assert json.loads(told.out)["version"] == "1"
    again = ztserve("registry", "push", "double:1", "--to", url)
    assert (again.code, again.out) == (0, done.out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("double:1", "--to", "https://r.example"), "expected oci+https://HOST/PATH"),
        (
            ("double:1", "--to", "mlflow+https://r.example"),
            "pushed to an oci+https",
        ),
        (("double", "--to", "oci+http://127.0.0.1:1"), "name the version to push"),
        (("double:9", "--to", "oci+http://127.0.0.1:1"), "has no double:9: publish it"),
        (("double:1", "--to", "oci+http://127.0.0.1:1"), "Connection refused"),
        (
            ("double:1", "--to", "oci+http://127.0.0.1:1", "--credentials", "none"),
            "registry credentials none: ",
        ),
        (
            ("double:1", "--to", "oci+http://127.0.0.1:1", "--from", "weights"),
            "is no OCI image layout",
        ),
    ],
)
def test_wrong_use_is_a_sentence(ztserve, project, published, words, message):
    done = ztserve("registry", "push", *words)
    assert done.code == 2
    assert message in done.err


@pytest.mark.slow
def test_a_project_whose_registry_is_a_server(ztserve, project, published):
    with serving(LayoutServer(project / ".ztserve/registry")) as server:
        path = project / "ztserve.toml"
        text = path.read_text()
        path.write_text(text.replace(".ztserve/registry", server.url))
        told = ztserve("verify", "double@production", "--json")
        assert json.loads(told.out)["version"] == "1"
        done = ztserve("publish", published, "double:2")
        assert done.code == 2
        assert "is read only; publish into a folder" in done.err
        done = ztserve("registry", "push", "double:1", "--to", server.url)
        assert "is no folder to push from" in done.err
