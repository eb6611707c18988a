import ast
from pathlib import Path
from traceback import format_exception

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ztserve.artifacts.registry as room
from ztserve.artifacts import Access, RegistryUrl, open_registry, read_access
from ztserve.artifacts.publish import stamp_with
from ztserve.artifacts.registry.address import Origin
from ztserve.errors import ConfigError

MODULES = sorted(Path(room.__file__).parent.glob("*.py"))


@pytest.mark.parametrize(
    ("text", "origin", "path"),
    [
        ("oci+https://r.example/a/b", Origin("https", "r.example", 443), "/a/b"),
        ("oci+https://R.Example:5000/", Origin("https", "r.example", 5000), ""),
        ("mlflow+https://m.example", Origin("https", "m.example", 443), ""),
        ("oci+http://127.0.0.1:5000", Origin("http", "127.0.0.1", 5000), ""),
        ("oci+http://localhost/a", Origin("http", "localhost", 80), "/a"),
        ("oci+http://[::1]:5000/a", Origin("http", "::1", 5000), "/a"),
    ],
)
def test_an_address_is_parsed_and_told_in_one_spelling(text, origin, path):
    url = RegistryUrl.parse(text)
    assert (url.origin, url.path) == (origin, path)
    assert RegistryUrl.parse(str(url)) == url


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://r.example", r"expected oci\+https://HOST/PATH or mlflow\+https"),
        ("s3+https://r.example", r"expected oci\+https"),
        ("oci+http://r.example", "plain http leaves this machine"),
        ("oci+http://127.0.0.1.example", "plain http leaves this machine"),
        ("oci+ftp://r.example", "neither https nor http"),
        ("oci+https://", "names no host"),
        ("oci+https://r example/", "names no host"),
        ("oci+https://r.example:port", "[Pp]ort"),
        ("oci+https://r.example/a?b=c", "without query, fragment or %"),
        ("oci+https://r.example/a#b", "without query, fragment or %"),
        ("oci+https://r.example/%2e%2e/b", "without query, fragment or %"),
        ("oci+https://r.example/../b", "without query, fragment or %"),
        ("oci+https://r.example//b", "without query, fragment or %"),
    ],
)
def test_an_address_that_is_none_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        RegistryUrl.parse(text)
    with pytest.raises(ConfigError, match=message):
        open_registry(text)


@pytest.mark.slow
@given(st.one_of(st.text(), st.from_regex(r"https?://[!-~]{0,40}", fullmatch=True)))
def test_any_text_is_an_address_or_a_config_error(text):
    try:
        url = RegistryUrl.parse(f"oci+{text}")
    except ConfigError:
        return
    assert RegistryUrl.parse(str(url)) == url
    assert (
        url.origin.scheme == "https"
        or url.origin.host in {"localhost", "::1"}
        or (url.origin.host.startswith("127."))
    )


SECRETIVE = (
    "https://user:hunter2@host/p",
    "https://user:hunter2/with/slashes@host/p",  # the parser: host user, port hunter2
    "https://user:hunter2@host:port/p",
    "https:/user:hunter2@host/p",
    "https://user:hunter2\u2100@host/p",
    "https://host:nonsense/p?token=hunter2",
    "user:hunter2@host",
)


def test_an_address_holds_no_password_and_no_message_repeats_one():
    with pytest.raises(ConfigError, match="credentials, which belong into") as caught:
        RegistryUrl.parse("oci+https://reader:hunter2@r.example/a")
    assert "hunter2" not in str(caught.value)
    for address in SECRETIVE:
        with pytest.raises(ConfigError) as caught:
            RegistryUrl.parse(f"oci+{address}")
        assert "hunter2" not in "".join(format_exception(caught.value))
        with pytest.raises(ConfigError) as caught:
            stamp_with(address)
        assert "hunter2" not in "".join(format_exception(caught.value))
    assert "hunter2" not in repr(Access(username="reader", password="hunter2"))


def credentials(folder, text, mode=0o600):
    path = folder / "credentials.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_credentials_are_read(tmp_path):
    (tmp_path / "ca.pem").write_text("PEM")
    (tmp_path / "ca.pem").chmod(0o644)
    text = 'username = "a"\npassword = "b"\nroots = "ca.pem"\nhosts = ["h:8443"]\n'
    access = read_access(credentials(tmp_path, text))
    assert access == Access("a", "b", "", "PEM", frozenset({"h:8443"}))
    assert access.allows(Origin("https", "h", 8443))
    assert not access.allows(Origin("https", "h", 443))
    assert read_access(credentials(tmp_path, 'token = "t"')) == Access(token="t")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_credentials_that_others_can_use_are_refused(tmp_path, mode):
    path = credentials(tmp_path, 'token = "t"', mode)
    with pytest.raises(ConfigError, match=f"credentials.toml.*has mode {mode:04o}"):
        read_access(path)
    path.chmod(0o600)
    assert read_access(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('user = "a"', "unknown key 'user'; expected username, password, token"),
        ('username = "a"', "expected username and password, or a token"),
        ('password = "a"', "expected username and password, or a token"),
        ('username = "a"\npassword = "b"\ntoken = "c"', "username and password, or"),
        ('username = "a:b"\npassword = "b"', "username: a colon cannot be sent"),
        ('token = "a\\r\\nX: y"', "token: expected printable ASCII"),
        ("token = 1", "token: expected printable ASCII"),
        ('hosts = "h"', "hosts: expected a list"),
        ('hosts = ["https://h"]', "is no host|names no host"),
        ('hosts = ["H"]', "hosts: 'H' is no host or host:port in lower case"),
        (f"hosts = {['h'] * 17}", "hosts: expected a list of at most 16"),
        ('roots = "none.pem"', r"none.pem: No such file"),
        ("token", "credentials.toml"),
    ],
)
def test_credentials_that_are_not_understood_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_access(credentials(tmp_path, text))


def test_credentials_that_are_absent_or_a_link_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_access(tmp_path / "none.toml")
    credentials(tmp_path, 'token = "t"')
    (tmp_path / "link.toml").symlink_to("credentials.toml")
    with pytest.raises(ConfigError, match="is a link"):
        read_access(tmp_path / "link.toml")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_of_the_registry_can_send_anything_but_get(path):
    tree = ast.parse(path.read_text())
    texts = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for text in texts:
        words = set(text.replace("\r\n", " ").split())
        assert not words & {"POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS"}
    imported = {
        name.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert not imported & {"requests", "httpx", "urllib3", "aiohttp"}
    sends = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    used = {n.attr for n in sends} & {"send", "sendall", "request", "urlopen", "open"}
    allowed = {"connection.py": {"sendall"}, "files.py": {"open"}}
    assert used - allowed.get(path.name, set()) == set()
    if path.name == "connection.py":  # the one request line there is
        lines = [t for t in texts if t.endswith(" ") and t.strip().isupper()]
        assert lines == ["GET "]
        assert len([n for n in sends if n.attr == "sendall"]) == 1
