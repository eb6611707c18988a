"""``ztserve quarantine``, with the embedded agent and with another one."""

import json
import shutil
import stat
import time

import pytest

from tests.unit.cli.support import Doors
from ztserve import TensorSpec, ZTDeployment, audit, config
from ztserve.errors import IdentityError
from ztserve.identity import Agent, Authority, Quarantine, Rules, quarantine_operations
from ztserve.identity.quarantine import file as quarantine_file

CLI = "spiffe://dev.ztserve.internal/ns/dev/sa/cli"
SHOP = "spiffe://dev.ztserve.internal/ns/web/sa/shop"
ADD = ("quarantine", "add", SHOP, "--reason", "laptop stolen")


@pytest.fixture
def listed(project):
    return project / ".ztserve/quarantine.json"


def agent_in(folder, listed, *, admin_ids=(CLI,)):
    authority = Authority("dev.ztserve.internal")
    return Agent(
        authority,
        folder,
        Rules.development(authority.trust_domain, worker_parent=None),
        admin_ids=admin_ids,
        extra_ops=quarantine_operations(listed, lambda _kind, _fields: None),
    )


@pytest.fixture
def embedded(project, listed):
    folder = config.agent_directory(config.load())
    try:
        with agent_in(folder, listed) as running:
            yield running
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def other(project, tmp_path_factory, listed, monkeypatch):
    """An agent that is not ours: all that we know of it is its Workload API."""
    folder = tmp_path_factory.mktemp("agent")
    folder.chmod(0o700)
    with agent_in(folder, listed) as running:
        monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", running.socket)
        yield running


def admins(project, *ids):
    toml = project / "ztserve.toml"
    text = toml.read_text().replace(
        "[identity] ", f"[identity]\nadmins = {json.dumps(ids)} #"
    )
    toml.write_text(text)
    assert config.load().identity.admins == ids


def events(project):
    files = (project / ".ztserve/audit").glob("quarantine-*.jsonl")
    found = [one for one in audit.read(*files) if one["class_uid"] == 6002]
    return [(one["activity_name"], one["unmapped"]) for one in found][1:]


def test_add_list_and_remove_go_through_the_agent(ztserve, embedded, listed):
    done = ztserve(*ADD)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{SHOP} is refused from now on; its streams end within 1 s\n"
    assert ztserve("quarantine", "add", "0A:B1", "--reason", "x").out.startswith("ab1 ")
    (entry, other) = json.loads(ztserve("quarantine", "list", "--json").out)
    assert (entry["subject"], entry["reason"]) == (SHOP, "laptop stolen")
    assert other["subject"] == "ab1"
    plain = ztserve("quarantine", "list").out.splitlines()[0].split("\t")
    assert plain == [SHOP, entry["added_at"], entry["by"], "laptop stolen"]
    assert ztserve("quarantine", "remove", SHOP).out == f"{SHOP} is let in again\n"
    assert [one.subject for one in quarantine_file.read(listed)] == ["ab1"]


def test_a_refusal_of_the_agent_is_told(ztserve, embedded):
    done = ztserve("quarantine", "remove", SHOP)
    assert (done.code, done.out) == (2, "")
    assert f"refuses: {SHOP} is not in quarantine" in done.err


@pytest.mark.slow
def test_without_any_agent_it_says_so(ztserve, project):
    done = ztserve(*ADD)
    assert done.code == 2
    assert "no identity agent at" in done.err
    config.agent_directory(config.load()).rmdir()  # empty, and under /tmp


def test_a_reason_must_be_given(ztserve, embedded, capsys):
    with pytest.raises(SystemExit):
        ztserve("quarantine", "add", SHOP)
    assert "--reason" in capsys.readouterr().err


def test_with_another_agent_an_admin_writes_the_file(ztserve, project, other, listed):
    admins(project, CLI)
    assert ztserve(*ADD).code == 0
    (entry,) = quarantine_file.read(listed)
    assert (entry.subject, entry.by) == (SHOP, CLI)
    assert stat.S_IMODE(listed.stat().st_mode) == 0o600
    assert SHOP in ztserve("quarantine", "list").out
    assert ztserve("quarantine", "remove", SHOP).code == 0
    (added, about), (removed, gone) = [
        one for one in events(project) if one[0].startswith("quarantine")
    ]
    assert (added, removed) == ("quarantine-add", "quarantine-remove")
    assert (about["subject"], about["by"], about["reason"]) == (
        SHOP,
        CLI,
        "laptop stolen",
    )
    assert gone == {"subject": SHOP, "by": CLI}


@pytest.mark.parametrize(
    ("named", "told"),
    [((), "nobody"), ((SHOP,), SHOP), ((CLI + "x",), CLI + "x")],
)
def test_with_another_agent_nobody_else_does(
    ztserve, project, other, listed, named, told
):
    admins(project, *named)
    for words in (ADD, ("quarantine", "remove", SHOP), ("quarantine", "list")):
        done = ztserve(*words)
        assert done.code == 2
        assert f"this process is {CLI}, and [identity] admins names {told}" in done.err
    assert not listed.exists()
    refused = [one for one in events(project) if one[0] == "quarantine-refused"]
    assert refused[0][1] == {
        "by": CLI,
        "op": "quarantine-add",
        "subject": SHOP,
        "reason": "laptop stolen",
    }


def test_the_file_is_where_the_settings_say(project):
    toml = project / "ztserve.toml"
    text = toml.read_text().replace(
        "[identity] ", '[identity]\nquarantine = "q.json" #'
    )
    toml.write_text(text)
    settings = config.load()
    assert settings.identity.quarantine == project / "q.json"
    with config.open_quarantine(settings) as following:
        assert isinstance(following, Quarantine)
        assert following.path == project / "q.json"


class Double(ZTDeployment):
    inputs = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs = (TensorSpec("y", "FP32", (-1, 2)),)

    def predict(self, x):
        return x * 2


def refused_handshake(log):
    """The cause of the first that is told: within a second, from this machine."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        for one in audit.read(log):
            if one.get("status_code") == "handshake":
                assert one["src_endpoint"] == {"ip": "127.0.0.1"}
                return one["status_detail"]
        time.sleep(0.05)
    return ""


@pytest.mark.slow
def test_the_serial_of_the_audit_is_what_the_readme_says_to_refuse(
    ztserve, project, embedded
):
    ask = ("predict", "double", "--example")
    with Doors(project, embedded._authority) as doors:
        doors.serve(Double)
        assert ztserve(*ask).code == 0
        (log,) = (project / ".ztserve/audit").glob("double-*.jsonl")
        call, *_ = (one for one in audit.read(log) if one["class_uid"] == 6003)
        serial = call["actor"]["user"]["credential_uid"]
        words = ("quarantine", "add", serial, "--reason", "laptop stolen")
        assert ztserve(*words).code == 0
        # Each command gets an SVID of its own: this one is not the stolen one.
        assert ztserve(*ask).code == 0
        assert ztserve("quarantine", "add", CLI, "--reason", "all of them").code == 0
        time.sleep(0.25)
        done = ztserve(*ask)
        assert done.code == 2
        assert f"{CLI} is in quarantine since" in refused_handshake(log)
        assert ztserve("quarantine", "remove", CLI).code == 0
        time.sleep(0.25)
        assert ztserve(*ask).code == 0


def test_nothing_starts_with_a_list_that_cannot_be_read(
    ztserve, project, embedded, listed
):
    listed.write_text("nonsense")
    sentence = f"the quarantine list cannot be used: {listed}: the list: not JSON"
    with (
        Doors(project, embedded._authority) as doors,
        pytest.raises(IdentityError, match=sentence),
    ):
        doors.serve(Double)
    for words in (("predict", "double", "--example"), ADD):
        done = ztserve(*words)
        assert done.code == 2
        assert f"{listed}: the list: not JSON" in done.err


def test_with_svids_on_disk_an_admin_writes_the_file(
    ztserve, project, embedded, listed
):
    assert ztserve("svid", "write", "out").code == 0
    out = project / "out"
    for one in ("svid.pem", "key.pem", "bundle.pem"):
        (out / one).chmod(0o600)
    embedded.stop()
    toml = project / "ztserve.toml"
    files = json.dumps([f"out/{one}.pem" for one in ("svid", "key", "bundle")])
    lines = f"[identity]\nadmins = {json.dumps([CLI])}\nsvid_files = {files} #"
    toml.write_text(toml.read_text().replace("[identity] ", lines))
    done = ztserve(*ADD)
    assert (done.code, done.err) == (0, "")
    assert [one.by for one in quarantine_file.read(listed)] == [CLI]
