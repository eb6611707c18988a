import pickle

import pytest

from ztserve import config
from ztserve.artifacts import RegistryUrl
from ztserve.errors import ConfigError


def settings(folder, text):
    path = folder / "ztserve.toml"
    path.write_text("[artifacts]\n" + text)
    path.chmod(0o600)
    return config.load(path)


def test_a_registry_is_a_folder_or_an_address(tmp_path):
    assert settings(tmp_path, 'registry = "models"').artifacts.folder == (
        tmp_path / "models"
    )
    ours = settings(
        tmp_path,
        'registry = "oci+https://r.example/a"\nregistry_credentials = "c.toml"',
    ).artifacts
    assert ours.registry == RegistryUrl.parse("oci+https://r.example/a")
    assert ours.registry_credentials == tmp_path / "c.toml"
    with pytest.raises(ConfigError, match=r"is read only; publish into a folder"):
        _ = ours.folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('registry = "https://r.example"', r"expected oci\+https://HOST/PATH"),
        ('registry = "oci+http://r.example"', "plain http leaves this machine"),
        ('registry = "oci+https://a:b@r.example"', "holds credentials"),
        ("registry = 1", "expected a string"),
        ('registry_credentials = "c"', "a folder, which asks for none"),
    ],
)
def test_a_registry_that_is_neither_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, text)


def test_the_registry_is_opened_with_the_credentials_of_their_own_file(tmp_path):
    text = 'registry = "oci+https://r.example/a"\nregistry_credentials = "c.toml"'
    ours = settings(tmp_path, text)
    with pytest.raises(ConfigError, match=r"credentials .*c.toml: .*No such file"):
        config.open_registry(ours)
    (tmp_path / "c.toml").write_text('token = "t"')
    (tmp_path / "c.toml").chmod(0o600)
    opened = config.open_registry(ours)
    assert repr(opened) == "DistributionRegistry('oci+https://r.example/a')"
    assert "token" not in repr(ours)
    assert pickle.loads(pickle.dumps(ours)) == ours  # to each replica, without secrets
