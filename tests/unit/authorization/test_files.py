import os

import pytest

from ztserve.authorization import PolicySet
from ztserve.errors import ConfigError

OPTIONS = {"trust_domain": "td", "namespace": "ml"}


@pytest.fixture
def file(tmp_path, policy):
    def write(name="a.yaml", text=None, mode=0o644):
        path = tmp_path / name
        path.write_text(policy(name=name[0]) if text is None else text)
        path.chmod(mode)
        return path

    return write


def test_several_files_count_together(file):
    policies = PolicySet.load([file("a.yaml"), str(file("b.yaml"))], **OPTIONS)
    assert policies.attached == ("ALLOW ns[ml]-policy[a]", "ALLOW ns[ml]-policy[b]")


def test_one_file_has_the_digest_of_its_text(file, policy):
    one = PolicySet.load([file()], **OPTIONS)
    assert one.digest == PolicySet.parse(policy(name="a"), **OPTIONS).digest


def test_a_refusal_names_the_file(file):
    path = file(text="kind: x\n")
    with pytest.raises(ConfigError, match=rf"{path}, line 1: "):
        PolicySet.load([path], **OPTIONS)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_refused(file, mode):
    with pytest.raises(ConfigError, match="writable by group or others; run: chmod"):
        PolicySet.load([file(mode=mode)], **OPTIONS)


def test_a_link_is_judged_by_the_file_it_leads_to(file, tmp_path):
    link = tmp_path / "link.yaml"
    link.symlink_to(file(mode=0o666))
    with pytest.raises(ConfigError, match="writable by group or others"):
        PolicySet.load([link], **OPTIONS)


def test_what_is_no_readable_file_is_refused(file, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    binary = tmp_path / "binary"
    binary.write_bytes(b"a: \xff")
    binary.chmod(0o600)
    for path, message in [
        (tmp_path / "missing", "No such file"),
        (tmp_path, "not a regular file"),
        (pipe, "not a regular file"),
        (binary, "not UTF-8 at byte 3"),
        (file(text="#" * 300_000), "larger than"),
    ]:
        with pytest.raises(ConfigError, match=message):
            PolicySet.load([path], **OPTIONS)


def test_no_file_and_too_many_files_are_refused(file):
    with pytest.raises(ConfigError, match="0 policy files"):
        PolicySet.load([], **OPTIONS)
    with pytest.raises(ConfigError, match="65 policy files"):
        PolicySet.load([file()] * 65, **OPTIONS)
