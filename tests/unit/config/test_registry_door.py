import pickle

import pytest

from tests.unit.artifacts.workshop import Workshop
from tests.unit.doors.support import DOMAIN
from ztserve import config
from ztserve.artifacts import open_registry
from ztserve.doors import DoorAddress
from ztserve.errors import ConfigError
from ztserve.testing import ThrowAwayAuthority

ADDRESS = "ztserve://127.0.0.1:7444"


def settings(folder, text="", head=""):
    path = folder / "ztserve.toml"
    path.write_text(f"{head}\n[artifacts]\n{text}\n")
    path.chmod(0o600)
    return config.load(path)


def test_a_registry_may_be_a_door(tmp_path):
    ours = settings(tmp_path, f'registry = "{ADDRESS}"')
    assert ours.artifacts.registry == DoorAddress("127.0.0.1:7444")
    assert ours.registry_id == f"spiffe://{DOMAIN}/ns/ztserve/sa/registry"
    assert pickle.loads(pickle.dumps(ours)) == ours
    with pytest.raises(ConfigError, match="is read only; publish into a folder"):
        _ = ours.artifacts.folder


def test_its_identity_may_be_another(tmp_path):
    other = "spiffe://other.example/ns/models/sa/store"
    ours = settings(tmp_path, f'registry_id = "{other}"')
    assert ours.registry_id == other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('registry = "ztserve://127.0.0.1"', "expected ztserve://HOST:PORT"),
        ('registry = "ztserve://a:1/b"', "expected ztserve://HOST:PORT"),
        (
            f'registry = "{ADDRESS}"\nregistry_credentials = "c"',
            "is a door, which asks for none",
        ),
        ('registry_id = "registry"', r"\[artifacts\] registry_id: SPIFFE ID"),
        (
            'registry_id = "spiffe://a.example/registry"',
            "expected spiffe://DOMAIN/ns/NAMESPACE/sa/SERVICE",
        ),
    ],
)
def test_what_is_no_door_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, text)


def test_a_door_listens_where_the_registry_is(tmp_path):
    ours = settings(tmp_path, 'registry = "ztserve://127.0.0.1:1234"')
    assert config.door_listener(ours) == ("127.0.0.1", 1234)
    assert config.door_listener(ours, "[::1]:5") == ("::1", 5)
    assert config.door_listener(settings(tmp_path)) == ("127.0.0.1", 7444)


@pytest.mark.parametrize("text", ["", "7444", "127.0.0.1", "127.0.0.1:x", "a:0"])
def test_a_listener_is_host_and_port(tmp_path, text):
    with pytest.raises(ConfigError, match="expected ztserve://HOST:PORT"):
        config.door_listener(settings(tmp_path), text)


def test_in_development_a_door_stays_on_this_machine(tmp_path):
    with pytest.raises(ConfigError, match="not a loopback address"):
        config.door_listener(settings(tmp_path), "0.0.0.0:7444")
    head = 'profile = "production"\nidentity.trust_domain = "td.example"'
    ours = settings(tmp_path, 'trust_root = "root.pub"', head)
    assert config.door_listener(ours, "0.0.0.0:7444") == ("0.0.0.0", 7444)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("", (64, 48, 65536)),
        (
            "transport = { max_in_flight = 8, max_in_flight_per_principal = 4 }",
            (8, 4, 65536),
        ),
    ],
)
def test_a_doors_limits_leave_room_for_others(tmp_path, head, expected):
    file = tmp_path / "p.yaml"
    file.write_text(POLICY.format(action="ALLOW", app="registry", note=""))
    file.chmod(0o600)
    ours = settings(tmp_path, "", f'authorization.policies = ["p.yaml"]\n{head}')
    source = ThrowAwayAuthority(DOMAIN).source(ours.registry_id)
    registry = open_registry(Workshop(tmp_path).signed())
    with config.open_log(ours, "registry", "1", source) as log:
        door = config.registry_door(ours, registry, source=source, log=log)
    limits = door._limits
    assert expected == (
        limits.max_in_flight,
        limits.max_in_flight_per_principal,
        limits.max_message_bytes,
    )


POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: door
  namespace: ztserve
  {note}
spec:
  action: {action}
  selector: {{matchLabels: {{app: {app}}}}}
  rules: [{{to: [{{operation: {{paths: ["/v1/registry/*"]}}}}]}}]
"""


@pytest.mark.parametrize(
    ("action", "app", "note"),
    [
        (None, "", ""),
        ("ALLOW", "another", ""),
        ("DENY", "registry", ""),
        ("ALLOW", "registry", 'annotations: {"istio.io/dry-run": "true"}'),
    ],
    ids=["no policy", "of another service", "DENY alone", "a dry run"],
)
def test_a_door_that_nobody_may_use_does_not_open(tmp_path, action, app, note):
    workshop = Workshop(tmp_path)
    head = ""
    if action:
        file = tmp_path / "p.yaml"
        file.write_text(POLICY.format(action=action, app=app, note=note))
        file.chmod(0o600)
        head = 'authorization.policies = ["p.yaml"]'
    ours = settings(tmp_path, "", head)
    source = ThrowAwayAuthority(DOMAIN).source(ours.registry_id)
    registry = open_registry(workshop.signed())
    with (
        config.open_log(ours, "registry", "1", source) as log,
        pytest.raises(ConfigError, match=r"no policy lets .* GET /v1/registry/NAME"),
    ):
        config.registry_door(ours, registry, source=source, log=log)
