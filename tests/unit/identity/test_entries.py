import contextlib
import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.identity.test_attestation import myself, process_of
from ztserve.errors import ConfigError, IdentityError, VerificationError
from ztserve.identity import SpiffeId
from ztserve.identity.agent.attestation import CannotTell
from ztserve.identity.agent.entries import MAX_BYTES, MAX_ENTRIES, parse_entries
from ztserve.identity.agent.entry_file import EntryFile
from ztserve.identity.agent.selectors import Selectors, check_selector
from ztserve.identity.process import harden_process

A, B = "spiffe://td.example/ns/x/sa/a", "spiffe://td.example/ns/x/sa/b"
UID, GID = f"unix:uid:{os.geteuid()}", f"unix:gid:{os.getegid()}"
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change uid")


def entry(spiffe_id=A, selectors=(UID,), **more):
    lines = [f"spiffe_id = {spiffe_id!r}", f"selectors = {list(selectors)!r}"]
    lines += [f"{key} = {value}" for key, value in more.items()]
    return "\n".join(["[[entry]]", *lines, ""])


def parse(text):
    return parse_entries(text.encode(), "td.example")


def test_an_entry_says_who_and_on_what_terms():
    one, two = parse(
        entry(
            selectors=(UID, "ray:deployment:Digits"),
            ttl_s=900,
            hint="'internal'",
            federates_with="['b.example']",
            admin="true",
        )
        + entry(B)
    )
    assert one.selectors == {UID, "ray:deployment:Digits"}
    assert one.grant.spiffe_id == A
    assert isinstance(one.grant.spiffe_id, SpiffeId)
    assert (one.grant.ttl_s, one.grant.hint, one.grant.admin) == (900, "internal", True)
    assert one.grant.federates_with == {"b.example"}
    assert (two.grant.ttl_s, two.grant.hint, two.grant.admin) == (None, "", False)
    assert two.grant.federates_with == frozenset()  # nobody, not everybody
    assert parse("entry = []") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got no entry"),
        ("entry = 1", r"expected \[\[entry\]\] tables"),
        ("entry = [1]", "entry 1: expected a table"),
        ("entry = []\nversion = 1", "got 'version'"),
        ("nonsense", "is not valid TOML"),
        ("[[entry]]\n" + "a=" + "[" * 5000, "is not valid TOML"),
        (entry() + entry(parent_id="'x'"), "entry 2: 'parent_id' is not a known key"),
        (entry("spiffe://other/a"), "not of the trust domain td.example"),
        (entry("spiffe://td.example"), "names a trust domain; a workload's ID"),
        (entry("td.example/a"), "must begin with spiffe://"),
        ("[[entry]]\nselectors = []", "spiffe_id: expected str, got None"),
        (entry(selectors=()), "without selectors it would apply to everybody"),
        (f"[[entry]]\nspiffe_id = '{A}'", "without selectors"),
        (f"[[entry]]\nspiffe_id = '{A}'\nselectors = 'x'", "selectors: expected list"),
        (entry(selectors=(1,)), "selectors: expected texts"),
        (entry(selectors=[f"unix:uid:{n}" for n in range(17)]), "17 texts, at most 16"),
        (entry(selectors=("unix:user:root",)), "selector 'unix:user:root': expected"),
        (entry(ttl_s=0.5), "ttl_s: expected 1 to 86400 seconds, got 0.5"),
        (entry(ttl_s=86401), "ttl_s: expected 1 to 86400"),
        (entry(ttl_s="nan"), "ttl_s: expected 1 to 86400"),
        (entry(ttl_s="true"), "ttl_s: expected 1 to 86400"),
        (entry(hint="1"), "hint: expected str, got 1"),
        (entry(hint="'" + "x" * 129 + "'"), "hint: expected at most 128 characters"),
        (entry(hint='"a\\nb"'), "hint: expected at most 128 characters"),
        (entry(admin="'true'"), "admin: expected bool, got 'true'"),
        (entry(federates_with="['spiffe://b.example']"), "SPIFFE ID"),
        (entry(federates_with="'b.example'"), "federates_with: expected list"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_a_file_of_entries_is_bounded():
    with pytest.raises(ConfigError, match=f"is larger than {MAX_BYTES} bytes"):
        parse("#" * (MAX_BYTES + 1))
    many = "\n".join("[[entry]]" for _ in range(MAX_ENTRIES + 1))
    with pytest.raises(ConfigError, match="1025 entries, at most 1024 are allowed"):
        parse(many)
    with pytest.raises(ConfigError, match="is not valid TOML"):
        parse_entries(b"\xff", "td.example")


@given(st.text() | st.text("[]{}='\"\n#entryspifd_ual: 0123456789.-T"))
def test_any_text_is_entries_or_a_config_error(text):
    with contextlib.suppress(ConfigError):
        assert isinstance(parse("entry = []\n" + text), tuple)
    with contextlib.suppress(ConfigError):
        parse("[[entry]]\n" + text)


# --- selectors ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "unix:uid:0",
        "unix:gid:1000",
        "unix:path:/usr/bin/python3.11 with a space",
        "unix:sha256:" + "0" * 64,
        "ray:app:default",
        "ray:deployment:Digits",
        "ray:node:" + "a" * 56,
    ],
)
def test_selectors_are_spelled_in_one_way(text):
    assert check_selector(text) == text
    for wrong in (f" {text}", f"{text}\n", f"x{text}", text.replace(":", "::", 1)):
        with pytest.raises(IdentityError, match="expected unix:uid:NUMBER"):
            check_selector(wrong)


@pytest.mark.parametrize(
    "text",
    ["unix:uid:007", "unix:uid:-1", "unix:uid:", "unix:path:bin", "unix:sha256:AB"],
)
def test_a_selector_that_could_never_hold_is_refused(text):
    with pytest.raises(IdentityError, match="expected unix:uid:NUMBER"):
        check_selector(text)


def test_the_kernel_tells_a_process_s_uid_gid_and_program():
    program = Path(sys.executable).resolve()
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    selectors = Selectors()
    for _ in range(2):
        assert selectors.of(myself(), ["unix:sha256"]) == {
            UID,
            GID,
            f"unix:path:{program}",
            f"unix:sha256:{digest}",
        }
    assert selectors.of(myself(), ["unix:uid"]) == {UID, GID}


def test_a_program_that_replaced_another_s_file_is_told_apart(tmp_path):
    copy = tmp_path / "sleep"
    copy.write_bytes(Path("/bin/sleep").read_bytes())
    copy.chmod(0o700)
    with subprocess.Popen([copy, "60"]) as child:
        try:
            copy.unlink()
            copy.write_bytes(b"another")
            process = process_of(child.pid)
            deadline = time.monotonic() + 5
            path = f"unix:path:{copy} (deleted)"
            while time.monotonic() < deadline:  # until it executes the program
                found = Selectors().of(process, ["unix:sha256"])
                if path in found:
                    break
            digest = hashlib.sha256(Path("/bin/sleep").read_bytes()).hexdigest()
            assert found == {UID, GID, path, f"unix:sha256:{digest}"}
        finally:
            child.kill()


def test_what_has_ended_has_no_selectors(child):
    process = process_of(child.pid)
    child.stdin.close()
    child.wait()
    for kinds in (["unix:uid"], ["unix:path"]):
        with pytest.raises(IdentityError, match="is gone"):
            Selectors().of(process, kinds)
    later = replace(myself(), started=1)
    with pytest.raises(IdentityError, match="has ended; its pid is another's"):
        Selectors().of(later, ["unix:uid"])


def test_whoever_knows_ray_tells_its_selectors_and_no_others():
    asked = []

    def further(process):
        asked.append(process)
        return ["ray:app:default", "unix:uid:0", "unix:path:/bin/sh"]

    selectors = Selectors(further)
    other = replace(myself(), uid=12345)
    assert selectors.of(other, ["unix:uid"]) == {"unix:uid:12345", GID}
    assert not asked
    found = selectors.of(other, ["ray:deployment"])
    assert found == {"unix:uid:12345", GID, "ray:app:default"}


@ROOT_ONLY
@pytest.mark.slow
def test_of_a_hardened_process_only_root_reads_the_program():
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.unit.identity.test_attestation import process_of
from ztserve.identity import harden_process
from ztserve.identity.agent.selectors import Selectors
os.setgid(12345); os.setuid(12345)
ready, done = os.pipe(), os.pipe()
victim = os.fork()
if victim == 0:
    if sys.argv[1] == "hardened": harden_process()
    else: __import__("ctypes").CDLL(None).prctl(4, 1, 0, 0, 0)
    os.write(ready[1], b"!"); os.close(done[1]); os.read(done[0], 1); os._exit(0)
os.read(ready[0], 1)
found = Selectors().of(process_of(victim), ["unix:path"])
print(any(s.startswith("unix:path:") for s in found))
os.close(done[1]); os.waitpid(victim, 0)
"""

    def told(state):
        return subprocess.run(
            [sys.executable, "-c", program, state],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.strip()

    assert told("hardened") == "False"
    assert told("as it was") == "True"
    assert harden_process  # what the child calls


# --- the file -----------------------------------------------------------------------


class Told(list):
    def __call__(self, kind, what):
        self.append((kind, what))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "entries.toml"


def written(path, text):
    """As an editor or a deployment tool writes: beside, then renamed."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o600)
    new.replace(path)


def opened(path, told=lambda kind, what: None, further=lambda process: ()):
    return EntryFile(path, "td.example", selectors=Selectors(further), told=told)


def until(fact, seconds=1.0):
    """Wait for what must come within a second; return how long it took."""
    began = time.monotonic()
    while not fact():
        assert time.monotonic() < began + seconds, "not within a second"
        time.sleep(0.01)
    return time.monotonic() - began


def granted(file, process=None):
    return [str(grant.spiffe_id) for grant in file.grants(process or myself())]


def test_an_entry_applies_where_all_of_its_selectors_hold(path):
    ray = {"ray:app:default", "ray:deployment:Digits", "ray:node:n1"}
    written(
        path,
        entry(A, (UID, "ray:deployment:Digits"))
        + entry(B, (UID, "ray:deployment:Other"))
        + entry(B, (GID, "ray:app:default")),
    )
    assert granted(opened(path, further=lambda _: ray)) == [A, B]
    assert granted(opened(path)) == []


def test_bytes_that_are_refused_are_not_parsed(path):
    def refuse(raw):
        raise VerificationError(f"{len(raw)} bytes that nobody signed")

    written(path, "not even TOML")
    with pytest.raises(VerificationError, match="13 bytes that nobody signed"):
        EntryFile(path, "td.example", check=refuse)


def test_the_first_entry_of_an_id_counts(path):
    written(path, entry(A, hint="'first'") + entry(B) + entry(A, hint="'second'"))
    file = opened(path)
    assert granted(file) == [A, B]
    assert file.grants(myself())[0].hint == "first"


def test_an_entry_that_names_no_uid_is_for_our_own(path):
    written(path, entry(A, (GID,)) + entry(B, (GID, "unix:uid:12345")))
    file = opened(path)
    assert granted(file) == [A]
    assert granted(file, replace(myself(), uid=12345)) == [B]


def test_an_entry_that_cannot_be_judged_now_is_not_refused(path):
    def further(_process):
        raise CannotTell("Ray does not answer")

    written(path, entry(A, ("ray:app:default",)))
    with pytest.raises(CannotTell):
        granted(opened(path, further=further))


@pytest.mark.slow
def test_a_change_is_taken_up_within_a_second(path):
    written(path, entry(A))
    told, bumps = Told(), []
    file = opened(path, told)
    file.subscribe(lambda: bumps.append(1))
    file.follow()
    try:
        written(path, entry(B))
        took = until(lambda: granted(file) == [B])
        assert took < 1
        until(lambda: bumps)
        written(path, "entry = []")
        until(lambda: granted(file) == [])
        path.write_text(entry(A))  # in place
        until(lambda: granted(file) == [A])
        assert [kind for kind, _ in told] == ["entries-loaded"] * 3
    finally:
        file.close()
        file.close()


@pytest.mark.slow
def test_a_bad_edit_is_told_and_the_entries_before_stay(path):
    written(path, entry(A))
    told = Told()
    file = opened(path, told)
    file.follow()
    edits = {
        "is not valid TOML": lambda: written(path, "[[entry"),
        "got no entry": lambda: written(path, ""),
        "'x' is not a known key": lambda: written(path, entry(B, x=1)),
        "others can change it": lambda: path.chmod(0o622),
        "No such file": path.unlink,
    }
    try:
        for count, (message, edit) in enumerate(edits.items(), 1):
            edit()
            until(lambda count=count: len(told) == count)
            assert told[-1][0] == "entries-refused"
            assert message in told[-1][1]
            assert granted(file) == [A]
        written(path, entry(B))
        until(lambda: granted(file) == [B])
    finally:
        file.close()


@pytest.mark.slow
def test_a_half_written_file_is_not_believed(path):
    """An editor that writes in place passes through a shorter file."""
    written(path, entry(A) + entry(B))
    file = opened(path)
    file.follow()
    try:
        with path.open("w") as half:
            half.write(entry(A))
            half.flush()
            deadline = time.monotonic() + 0.6
            while time.monotonic() < deadline:
                half.write("# and on it goes\n")
                half.flush()
                assert granted(file) == [A, B]
                time.sleep(0.05)
            half.write(entry(B, hint="'new'"))
        until(lambda: file.grants(myself())[1].hint == "new")
    finally:
        file.close()


def test_a_file_that_others_can_change_or_that_is_none_names_nobody(path, tmp_path):
    with pytest.raises(ConfigError, match=r"registration entries: .*No such file"):
        opened(path)
    with pytest.raises(ConfigError, match="is not a regular file"):
        opened(tmp_path)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is not a regular file"):
        opened(path)
    path.unlink()
    written(path, entry())
    path.chmod(0o622)
    with pytest.raises(ConfigError, match="has mode 0622: others can change it"):
        opened(path)
    path.rename(tmp_path / "other.toml")
    path.symlink_to("other.toml")
    with pytest.raises(ConfigError, match=r"is a link to 'other\.toml'"):
        opened(path)
    path.unlink()
    written(path, "#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=f"over {MAX_BYTES} bytes"):
        opened(path)


@ROOT_ONLY
def test_a_file_of_another_uid_names_nobody(path):
    written(path, entry())
    os.chown(path, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to uid 12345"):
        opened(path)


@pytest.mark.slow
def test_no_edit_ends_the_follower(path, monkeypatch):
    written(path, entry(A))
    told = Told()
    file = opened(path, told)
    file.follow()
    try:
        written(path, entry(A, ttl_s="0x" + "F" * 4000))
        until(lambda: len(told) == 1)
        monkeypatch.setattr(file, "_read", Mock(side_effect=RuntimeError("odd")))
        written(path, entry(A, ttl_s=900))
        until(lambda: len(told) == 2)
        assert [kind for kind, _ in told] == ["entries-refused"] * 2
        assert "RuntimeError('odd')" in told[1][1]
        assert granted(file) == [A]
        monkeypatch.undo()
        written(path, "entry = []")
        until(lambda: granted(file) == [])
    finally:
        file.close()


def test_ray_that_is_away_does_not_keep_an_entry_that_was_removed(path):
    def away(_process):
        raise CannotTell("Ray does not answer")

    workers = entry(B, (GID, "unix:uid:12345", "ray:deployment:Digits"))
    written(path, workers)  # and that of our process is gone
    file = opened(path, further=away)
    assert granted(file) == []
    written(path, entry(A) + workers)
    assert granted(opened(path, further=away)) == [A]
    with pytest.raises(CannotTell):
        granted(file, replace(myself(), uid=12345))


def test_an_entry_that_is_gone_is_withdrawn_though_another_asks_for_ray(path):
    """A process that is B hears of B's end; whether it could be A, nobody asks."""

    def away(_process):
        raise CannotTell("Ray does not answer")

    written(path, entry(A, ("ray:deployment:Digits",)))
    file = opened(path, further=away)
    with pytest.raises(CannotTell):
        granted(file)
    assert file.grants(myself(), SpiffeId(B)) == ()
