import os
import pickle
import socket

import pytest

from ztserve import config
from ztserve.config.settings import Between
from ztserve.errors import ConfigError, IdentityError
from ztserve.identity import Agent, Rules, SpiffeId
from ztserve.testing import ThrowAwayAuthority

PRODUCTION = (
    "profile = 'production'\n[identity]\ntrust_domain = 'example.org'\n"
    "[artifacts]\ntrust_root = 'root.pub'\n"
)


def written(folder, text, mode=0o600):
    path = folder / "ztserve.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("ZTSERVE_CONFIG", raising=False)
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)


def test_without_a_file_the_development_defaults_hold_and_nobody_may_call(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = config.load()
    assert settings.profile == "development"
    assert settings.authorization.policies == ()
    assert settings.artifacts.registry == tmp_path / ".ztserve/registry"
    assert settings.file is None


def test_the_file_is_never_looked_for_in_parent_directories(tmp_path, monkeypatch):
    written(tmp_path, '[identity]\nnamespace = "other"\n')
    below = tmp_path / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    assert config.load().identity.namespace == "ml-inference"
    monkeypatch.chdir(tmp_path)
    assert config.load().identity.namespace == "other"


def test_the_variable_names_a_file_that_must_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("ZTSERVE_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="there is no such file"):
        config.load()


def test_a_link_that_leads_nowhere_is_no_leave_for_the_defaults(tmp_path, monkeypatch):
    (tmp_path / "ztserve.toml").symlink_to(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config.load()


def test_paths_are_relative_to_the_file(tmp_path):
    path = written(tmp_path, '[authorization]\npolicies = ["a.yaml", "/b.yaml"]\n')
    policies = config.load(path).authorization.policies
    assert [str(p) for p in policies] == [str(tmp_path / "a.yaml"), "/b.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense = 1", "'nonsense' is not a known key"),
        ("[nonsense]", "'nonsense' is not a known key"),
        ("identity = 1", "'identity' is not a known key"),
        ("[transport]\nmax_calls = 1", "'max_calls' is not a known key; expected one"),
        ("base = '/'", "'base' is not a known key"),
        ("file = '/'", "'file' is not a known key"),
        ("set_keys = []", "'set_keys' is not a known key"),
        ("profile = 'prod'", "'prod' is none of 'development', 'production'"),
        ("profile = ['production']", "is none of"),
        ("[transport]\nmax_message_bytes = '1'", "expected a whole number, got '1'"),
        ("[transport]\nmax_message_bytes = true", "expected a whole number, got True"),
        ("[transport]\nmax_message_bytes = 1.0", "expected a whole number, got 1.0"),
        ("[transport]\nmax_call_s = '1'", "expected a number, got '1'"),
        ("[transport]\nmax_call_s = true", "expected a number, got True"),
        ("[identity]\ntrust_domain = 1", "trust_domain: expected a string, got 1"),
        ("[audit]\ndirectory = 1", "expected a string, the path of a file, got 1"),
        ("[authorization]\npolicies = 'a'", "expected a list, got 'a'"),
        ("[authorization]\npolicies = [1]", "expected a string, the path of a file"),
        ("[authorization]\npolicies = [['a']]", "expected a string"),
        ("[authorization]\ndelegates = ['gw']", "delegates"),
        ("[identity]\nadmins = ['gw']", r"\[identity\] admins"),
        ("[identity]\ntrust_domain = 'Dev'", "identity"),
        ("[identity]\ntrust_domain = ''", "trust_domain"),
        ("[identity]\nnamespace = 'ML'", "namespace: 'ML'"),
        ("[identity]\nnamespace = ''", "namespace: '' is not a Kubernetes-style name"),
        ("[gateway]\nservice = 'a/b'", "service: 'a/b'"),
        ("[gateway]\nnamespace = '..'", "namespace: '..'"),
        ("[gateway]\ndeployments = ['a/b/c']", "deployments: 'a/b'"),
        ("[gateway]\ndeployments = ['/b']", "deployments: ''"),
        ("[transport]\nfirst_port = 2\nlast_port = 1", "first_port is above last_port"),
        ("[transport]\nlast_port = 1", "first_port 0 means any free port"),
        ("profile = 'production'", "the development domain is refused in production"),
        (
            PRODUCTION.replace("trust_root", "# trust_root"),
            "trust_root: production demands that the trust policy is signed",
        ),
        ("[", "is not valid TOML"),
        ("a = 1\na = 2", "is not valid TOML"),
        ("a = " + "[" * 5000, "is nested too deeply"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        config.load(written(tmp_path, text))


NUMBERS = [
    ("transport", "first_port"),
    ("transport", "max_message_bytes"),
    ("transport", "max_call_s"),
    ("transport", "max_in_flight"),
    ("directory", "port"),
    ("gateway", "port"),
    ("identity", "svid_ttl_s"),
    ("identity", "wait_s"),
    ("validation", "max_rows"),
    ("filtering", "max_output_bytes"),
    ("audit", "max_bytes"),
]


@pytest.mark.parametrize(("table", "key"), NUMBERS, ids="{0[0]}.{0[1]}".format)
@pytest.mark.parametrize("value", ["-1", "0.0", "inf", "-inf", "nan", "1" + "0" * 400])
def test_no_limit_can_be_switched_off(tmp_path, table, key, value):
    message = f"{key}: .*(no limit can be switched off|expected a whole number)"
    with pytest.raises(ConfigError, match=message):
        config.load(written(tmp_path, f"[{table}]\n{key} = {value}"))


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("[directory]\nport = 65536", Between(0, 65535)),
        ("[gateway]\nport = 65536", Between(0, 65535)),
        ("[transport]\nlast_port = 65536", Between(0, 65535)),
        ("[transport]\nmax_in_flight = 1025", Between(1, 1024)),
        ("[transport]\nmax_message_bytes = 2147483648", Between(1, 1 << 30)),
        ("[validation]\nmax_rows = 0", Between(1, 1 << 20)),
    ],
)
def test_a_number_beyond_its_bounds_is_refused_and_they_are_told(
    tmp_path, text, bounds
):
    with pytest.raises(ConfigError, match=f"expected {bounds[0]} to {bounds[1]};"):
        config.load(written(tmp_path, text))


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("false", False)])
def test_a_switch_is_true_or_false(tmp_path, text, expected):
    path = written(tmp_path, f"[identity]\nrequire_jwt = {text}\n")
    assert config.load(path).identity.require_jwt is expected


@pytest.mark.parametrize("value", ["1", '"true"', "[]"])
def test_anything_else_is_no_switch(tmp_path, value):
    message = "require_jwt: expected true or false"
    with pytest.raises(ConfigError, match=message):
        config.load(written(tmp_path, f"[identity]\nrequire_jwt = {value}\n"))


def test_tokens_need_an_agent(tmp_path):
    settings = config.load(written(tmp_path, "[identity]\nrequire_jwt = true\n"))
    source = ThrowAwayAuthority("dev.ztserve.internal").source(settings.developer_id)
    with pytest.raises(ConfigError, match="require_jwt: tokens come from a SPIFFE"):
        config.open_tokens(settings, source)
    assert config.open_tokens(config.load(written(tmp_path, "")), source) is None


def test_a_whole_number_will_do_for_seconds(tmp_path):
    path = written(tmp_path, "[transport]\nmax_call_s = 7\n")
    found = config.load(path).transport.max_call_s
    assert (found, type(found)) == (7.0, float)


@pytest.mark.parametrize("table", ["transport", "directory", "gateway"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gpu-7", ""])
def test_development_stays_on_this_machine(tmp_path, table, host):
    with pytest.raises(ConfigError, match=rf"\[{table}\] host: .* loopback"):
        config.load(written(tmp_path, f"[{table}]\nhost = '{host}'"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_development_may_use_any_loopback_address(tmp_path, host):
    assert config.load(written(tmp_path, f"[gateway]\nhost = '{host}'"))


def test_production_may_listen_anywhere(tmp_path):
    text = PRODUCTION
    path = written(tmp_path, text + "[gateway]\nhost = '0.0.0.0'\n")
    assert config.load(path).gateway.host == "0.0.0.0"


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(tmp_path, mode):
    with pytest.raises(ConfigError, match=r"others may write to it.* chmod go-w"):
        config.load(written(tmp_path, "", mode=mode))


def test_a_link_to_a_file_that_others_may_write_is_refused(tmp_path):
    (tmp_path / "link.toml").symlink_to(written(tmp_path, "", mode=0o666))
    with pytest.raises(ConfigError, match="others may write to it"):
        config.load(tmp_path / "link.toml")


def test_a_giant_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="larger than"):
        config.load(written(tmp_path, "#" * 300_000))


def test_what_is_no_plain_file_is_refused_and_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="is not a regular file"):
        config.load(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is not a regular file"):
        config.load(tmp_path)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "s"))
        with pytest.raises(ConfigError, match="cannot be read"):
            config.load(tmp_path / "s")


def test_each_value_says_where_it_came_from(tmp_path, monkeypatch):
    path = written(tmp_path, "[gateway]\nport = 9000\n").rename(tmp_path / "my.toml")
    monkeypatch.setenv("ZTSERVE_CONFIG", str(path))
    rows = {n: (value, where) for n, value, where in config.entries(config.load())}
    assert rows["gateway.port"] == (9000, str(path))
    assert rows["gateway.host"] == ("127.0.0.1", "default")
    assert rows["profile"] == ("development", "default")


def test_settings_travel_to_other_processes_unchanged(tmp_path):
    settings = config.load(written(tmp_path, "[gateway]\nport = 9000\n"))
    assert pickle.loads(pickle.dumps(settings)) == settings


# --- rooms ------------------------------------------------------------------------


def test_production_asks_for_a_real_agent(tmp_path):
    text = PRODUCTION
    settings = config.load(written(tmp_path, text))
    with pytest.raises(ConfigError, match="SPIFFE_ENDPOINT_SOCKET"):
        config.obtain_identity(settings)


@pytest.fixture
def foreign_agent(tmp_path, monkeypatch):
    """An agent of the node's own, that calls this process ns/dev/sa/cli."""
    authority = ThrowAwayAuthority("dev.ztserve.internal")
    directory = tmp_path / "agent"
    directory.mkdir(mode=0o700)
    default = "spiffe://dev.ztserve.internal/ns/dev/sa/cli"
    rules = Rules(trust_domain=authority.trust_domain, default_id=default)
    with Agent(authority, directory, rules) as agent:
        monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", agent.socket)
        yield agent


def test_the_agent_of_the_node_is_used_unchanged(tmp_path, foreign_agent):
    settings = config.load(written(tmp_path, ""))
    with config.obtain_identity(settings) as source:
        assert source.socket == foreign_agent.socket
        assert source.current().svid.id == settings.developer_id
    with config.obtain_identity(settings, settings.developer_id) as source:
        assert source.current().svid.id == settings.developer_id


@pytest.mark.slow
def test_another_identity_than_expected_is_refused(tmp_path, foreign_agent):
    settings = config.load(written(tmp_path, "[identity]\nwait_s = 0.5\n"))
    wanted = settings.spiffe_id("inference-service")
    with pytest.raises(IdentityError, match="mend its registration entry") as refusal:
        config.obtain_identity(settings, wanted)
    assert str(wanted) in str(refusal.value)
    assert str(settings.developer_id) in str(refusal.value)


def test_the_ids_of_development(tmp_path):
    settings = config.load(written(tmp_path, ""))
    domain = "spiffe://dev.ztserve.internal"
    assert settings.developer_id == SpiffeId.parse(f"{domain}/ns/dev/sa/cli")
    assert settings.directory_id == f"{domain}/ns/ztserve/sa/directory"
    assert settings.gateway_id == f"{domain}/ns/ml-api/sa/api-gateway"
    assert settings.spiffe_id("x") == f"{domain}/ns/ml-inference/sa/x"


def test_limits_are_those_of_the_file(tmp_path):
    text = "[transport]\nmax_call_s = 3\nmax_body_s = 2\nmax_in_flight = 5\n"
    limits = config.limits(config.load(written(tmp_path, text)))
    assert (limits.max_call_s, limits.body_s, limits.max_in_flight) == (3, 2, 5)


def test_the_largest_limits_of_the_file_are_ones_that_transport_takes(tmp_path):
    text = """[transport]
max_message_bytes = 1073741824
max_call_s = 2592000
max_body_s = 2592000
max_in_flight = 1024
max_in_flight_per_principal = 1024
max_connection_age_s = 2592000
"""
    assert config.limits(config.load(written(tmp_path, text)))
