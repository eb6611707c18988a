import pytest

from ztserve import config
from ztserve.errors import ConfigError


def written(folder, text, mode=0o600):
    path = folder / "ztserve.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_without_a_file_the_development_defaults_hold_and_nobody_may_call(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZTSERVE_CONFIG", raising=False)
    settings = config.load()
    assert settings.profile == "development"
    assert settings.authorization.policies == ()
    assert settings.artifacts.registry == tmp_path / ".ztserve/registry"


def test_the_file_is_never_looked_for_in_parent_directories(tmp_path, monkeypatch):
    written(tmp_path, '[identity]\nnamespace = "other"\n')
    below = tmp_path / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    monkeypatch.delenv("ZTSERVE_CONFIG", raising=False)
    assert config.load().identity.namespace == "ml-inference"
    monkeypatch.chdir(tmp_path)
    assert config.load().identity.namespace == "other"


def test_the_variable_names_a_file_that_must_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("ZTSERVE_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="there is no such file"):
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
        ("[transport]\nmax_calls = 1", "'max_calls' is not a known key; expected one"),
        ("base = '/'", "'base' is not a known key"),
        ("profile = 'prod'", "'prod' is none of"),
        ("[transport]\nmax_message_bytes = '1'", "max_message_bytes: expected a int"),
        ("[transport]\nmax_message_bytes = true", "expected a int"),
        ("[transport]\nmax_message_bytes = 0", "no limit can be switched off"),
        ("[transport]\nmax_call_s = -1", "no limit can be switched off"),
        ("[transport]\nmax_call_s = inf", "no limit can be switched off"),
        ("[transport]\nmax_call_s = nan", "no limit can be switched off"),
        ("[authorization]\npolicies = 'a'", "expected a list"),
        ("[authorization]\ndelegates = ['gw']", "delegates"),
        ("[identity]\ntrust_domain = 'Dev'", "identity"),
        ("[identity]\nnamespace = 'ML'", "namespace: 'ML'"),
        ("[identity]\nnamespace = ''", "namespace"),
        ("[transport]\nfirst_port = 2\nlast_port = 1", "first_port is above last_port"),
        ("profile = 'production'", "the development domain is refused in production"),
        ("[", "is not valid TOML"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        config.load(written(tmp_path, text))


def test_a_file_that_others_may_write_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="chmod go-w"):
        config.load(written(tmp_path, "", mode=0o666))


def test_a_giant_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="larger than"):
        config.load(written(tmp_path, "#" * 300_000))


def test_each_value_says_where_it_came_from(tmp_path):
    path = written(tmp_path, "[gateway]\nport = 9000\n")
    rows = {name: (value, where) for name, value, where in config.entries(config.load(path))}
    assert rows["gateway.port"] == (9000, str(path))
    assert rows["gateway.host"] == ("127.0.0.1", "default")


def test_production_asks_for_a_real_agent(tmp_path, monkeypatch):
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    text = "profile = 'production'\n[identity]\ntrust_domain = 'example.org'\n"
    settings = config.load(written(tmp_path, text))
    with pytest.raises(ConfigError, match="SPIFFE_ENDPOINT_SOCKET"):
        config.obtain_identity(settings)
