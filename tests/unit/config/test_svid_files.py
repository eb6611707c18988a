import pytest

from ztserve import config
from ztserve.errors import ConfigError, IdentityError
from ztserve.identity.svid import pem
from ztserve.testing import HostileAgent, ThrowAwayAuthority

ME = "spiffe://td.example/ns/ml-api/sa/api-gateway"


@pytest.fixture
def authority():
    return ThrowAwayAuthority("td.example")


@pytest.fixture
def folder(tmp_path, authority, monkeypatch):
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    tmp_path.chmod(0o700)
    svid = authority.issue(ME)
    for name, text in (
        ("svid.pem", svid.chain_pem()),
        ("key.pem", svid.key_pem()),
        ("bundle.pem", pem(authority.bundle)),
        ("credential-bundle.private-key.pem", svid.key_pem() + svid.chain_pem()),
        ("td.example.spiffe-trust-bundle.pem", pem(authority.bundle)),
    ):
        (tmp_path / name).write_bytes(text)
        (tmp_path / name).chmod(0o600)
    return tmp_path


FILES = "svid_files = ['svid.pem', 'key.pem', 'bundle.pem']"


def settings(folder, line):
    path = folder / "ztserve.toml"
    path.write_text(
        "profile = 'production'\n[identity]\ntrust_domain = 'td.example'\n"
        f"wait_s = 0.1\n{line}\n[artifacts]\ntrust_root = 'root.pub'\n"
    )
    path.chmod(0o600)
    return config.load(path)


@pytest.mark.parametrize("line", [FILES, "svid_folder = '.'"])
def test_an_identity_may_lie_on_disk(folder, line):
    chosen = settings(folder, line)
    with config.obtain_identity(chosen, chosen.gateway_id) as source:
        assert source.current().svid.id == ME


def test_another_identity_on_disk_than_expected_is_refused(folder):
    chosen = settings(folder, FILES)
    with pytest.raises(IdentityError, match=r"beside .*svid\.pem: this process is"):
        config.obtain_identity(chosen, chosen.directory_id)


def test_w4_the_agent_that_the_environment_names_comes_before_files(
    folder, authority, monkeypatch
):
    chosen = settings(folder, FILES)
    with HostileAgent(folder / "agent.sock", authority, ME) as agent:
        monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", agent.socket)
        with config.obtain_identity(chosen) as source:
            assert source.whence == f"the SPIFFE agent at {agent.socket}"


@pytest.mark.parametrize(
    "line", ["svid_files = ['svid.pem', 'key.pem']", f"{FILES}\nsvid_folder = '.'"]
)
def test_two_files_or_both_forms_are_refused(folder, line):
    with pytest.raises(ConfigError, match="expected three paths"):
        settings(folder, line)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("svid_folder = '.'", "svid_folder"),
        (FILES, "svid_files"),
        ("entries = 'e.toml'", "entries"),
        ("federation = 'f.toml'", "federation"),
        ("bundle_port = 8444", "bundle_port"),
    ],
)
def test_what_spire_decides_is_not_said_a_second_time(folder, line, named):
    with pytest.raises(ConfigError, match=f"{named}: not beside spire_admin_socket"):
        settings(folder, f"spire_admin_socket = 'admin.sock'\n{line}")


def test_production_may_have_its_agent_from_spire(folder):
    chosen = settings(folder, "spire_admin_socket = 'admin.sock'")
    assert chosen.identity.spire_admin_socket == folder / "admin.sock"
    assert config.has_agent(chosen)
    assert not config.has_agent(settings(folder, ""))
    with pytest.raises(IdentityError, match="nothing is running for the project"):
        config.obtain_identity(chosen)
    with pytest.raises(ConfigError, match="svid_folder or spire_admin_socket"):
        config.obtain_identity(settings(folder, ""))
