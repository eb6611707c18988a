import os
import shutil
import stat

import pytest

from ztserve import config
from ztserve.artifacts import TrustPolicy
from ztserve.authorization import PolicySet
from ztserve.cli.init import initialise


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


WRITTEN = [
    "ztserve.toml",
    "policies/seed.yaml",
    "policies/developer.yaml",
    ".ztserve/keys/trainer.pem",
    ".ztserve/keys/deployer.pem",
    ".ztserve/keys/timestamp.pem",
    ".ztserve/trust.toml",
]


def test_init_writes_a_project_and_names_what_it_wrote(ztserve, empty):
    done = ztserve("init")
    assert (done.code, done.err) == (0, "")
    assert [os.path.relpath(line) for line in done.out.splitlines()] == WRITTEN


def test_a_second_init_changes_nothing(ztserve, empty):
    ztserve("init")
    before = snapshot(empty)
    done = ztserve("init")
    assert (done.code, done.out) == (0, "")
    assert done.err == f"{empty} is a project already: nothing was written\n"
    assert snapshot(empty) == before


def test_what_a_person_changed_is_kept_and_what_lacks_is_written(ztserve, empty):
    ztserve("init")
    (empty / "ztserve.toml").write_text("[gateway]\nport = 9000\n")
    (empty / "policies/seed.yaml").unlink()
    done = ztserve("init")
    assert done.out.split() == ["policies/seed.yaml"]
    assert config.load().gateway.port == 9000


def test_init_takes_a_folder(ztserve, empty):
    assert ztserve("init", "there").code == 0
    assert (empty / "there/ztserve.toml").is_file()
    assert not (empty / "ztserve.toml").exists()


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_nobody_else_may_write_and_keys_are_their_owners(empty, mask):
    before = os.umask(mask)
    try:
        initialise(empty / "project")
    finally:
        os.umask(before)
    project = empty / "project"
    for path in project.rglob("*"):
        assert not mode(path) & 0o022, path
    assert mode(project / ".ztserve") == mode(project / ".ztserve/keys") == 0o700
    for key in ("trainer", "deployer", "timestamp"):
        assert mode(project / f".ztserve/keys/{key}.pem") == 0o600
    assert config.load(project / "ztserve.toml")


def test_keys_are_kept_out_of_repositories(ztserve, empty):
    ztserve("init")
    assert (empty / ".ztserve/.gitignore").read_text() == "*\n"


def test_the_trust_policy_names_a_trainer_and_a_deployer(project):
    trust = TrustPolicy.load(config.load().artifacts.trust_policy)
    roles = {signer.name: set(signer.roles) for signer in trust.signers}
    assert roles == {
        "development trainer": {"trainer"},
        "development deployer": {"deployer"},
    }
    (clock,) = trust.timestamp_authorities
    assert clock.name == "development clock"


def test_the_trust_policy_can_be_signed_as_it_is(ztserve, project):
    """Its keys stand within: a signature of the policy covers no other file."""
    trust = config.load().artifacts.trust_policy
    shutil.rmtree(project / ".ztserve/keys")
    ztserve("key", "new", "root.pem", "--root")
    assert ztserve("sign", trust, "--key", "root.pem").code == 0
    signed = TrustPolicy.load(trust, root=project / "root.pub")
    assert (len(signed.signers), len(signed.timestamp_authorities)) == (2, 1)


def test_a_trust_policy_elsewhere_holds_its_keys(ztserve, empty):
    odd = 'a "quoted" folder'
    (empty / odd).mkdir()
    (empty / "ztserve.toml").write_text(
        f"[artifacts]\ntrust_policy = '{odd}/trust.toml'\n"
    )
    (empty / "ztserve.toml").chmod(0o600)
    assert ztserve("init").code == 0
    assert len(TrustPolicy.load(empty / odd / "trust.toml").signers) == 2


def test_the_policies_are_understood_and_let_the_developer_in(project):
    settings = config.load()
    policies = PolicySet.load(
        settings.authorization.policies,
        trust_domain=settings.identity.trust_domain,
        namespace=settings.identity.namespace,
        labels={"app": "inference-service"},
    )
    assert len(policies.attached) >= 2


def test_keys_that_no_trust_policy_names_are_refused(ztserve, project):
    (project / ".ztserve/trust.toml").unlink()
    before = snapshot(project)
    done = ztserve("init")
    assert done.code == 2
    assert "trainer.pem exists; a key is never overwritten" in done.err
    assert snapshot(project) == before


def test_production_gets_no_development_keys(ztserve, empty):
    (empty / "ztserve.toml").write_text(
        "profile = 'production'\n[identity]\ntrust_domain = 'example.org'\n"
        "[artifacts]\ntrust_root = 'root.pub'\n"
    )
    (empty / "ztserve.toml").chmod(0o600)
    done = ztserve("init")
    assert done.code == 2
    assert "production lacks its trust policy" in done.err
    assert not (empty / ".ztserve").exists()


def test_a_link_in_place_of_a_file_is_not_followed(ztserve, empty):
    (empty / "policies").mkdir()
    (empty / "policies/seed.yaml").symlink_to(empty / "victim")
    ztserve("init")
    assert not (empty / "victim").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(ztserve, empty):
    (empty / "file").write_text("")
    done = ztserve("init", "file/project")
    assert done.code == 2
    assert done.err.startswith("ztserve init: ")
    assert "file/project" in done.err
    assert done.err.count("\n") == 1
