import json
import logging
import os
import stat
import threading
import time

import pytest

from ztserve import types
from ztserve.errors import AuditError, IdentityError, Unauthenticated, Unavailable
from ztserve.identity import Agent, Quarantine, Rules, admin, quarantine_operations
from ztserve.identity.quarantine import entry as quarantine_entry
from ztserve.identity.quarantine import file as quarantine_file
from ztserve.types import Peer

CLI = "spiffe://td.example/ns/dev/sa/cli"
SHOP = "spiffe://td.example/ns/web/sa/shop"
SERIAL = 0x0AB12CD34EF
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change owner")
GOOD = {"subject": SHOP, "reason": "why", "added_at": "2026-01-31T12:00:00Z", "by": "a"}


def peer(spiffe_id=SHOP, serial=SERIAL):
    return Peer(spiffe_id, serial, types.now(), types.now(), "")


@pytest.fixture
def path(private):
    return private / "quarantine.json"


@pytest.fixture
def quarantine(path):
    with Quarantine.open(path) as following:
        yield following


def add(path, subject=SHOP, reason="its laptop was stolen"):
    return quarantine_file.add(
        path, subject, reason=reason, by="me", on_event=lambda *_: None
    )


def remove(path, subject=SHOP):
    return quarantine_file.remove(path, subject, by="me", on_event=lambda *_: None)


def soon(fact, seconds=1.0):
    end = time.monotonic() + seconds
    while not fact() and time.monotonic() < end:
        time.sleep(0.005)
    return fact()


def refuses(quarantine, one=None):
    try:
        quarantine.check(one or peer())
    except (Unauthenticated, Unavailable):
        return True
    return False


# --- the list ---------------------------------------------------------------------


@pytest.mark.slow
def test_who_is_on_the_list_is_refused_in_words_until_taken_off(quarantine, path):
    quarantine.check(peer())
    entry = add(path)
    assert soon(lambda: refuses(quarantine))
    with pytest.raises(Unauthenticated) as caught:
        quarantine.check(peer())
    assert caught.value.public == "the peer's identity could not be verified"
    assert caught.value.reason == (
        f"{SHOP} is in quarantine since {entry.added_at}: its laptop was stolen"
    )
    quarantine.check(peer(CLI))
    assert remove(path) == SHOP
    assert soon(lambda: not refuses(quarantine))


@pytest.mark.slow
def test_a_serial_shuts_out_one_certificate_only(quarantine, path):
    assert add(path, "0A:B1:2C:D3:4E:F").subject == "ab12cd34ef"
    assert soon(lambda: refuses(quarantine))
    with pytest.raises(Unauthenticated, match=f"serial ab12cd34ef of {SHOP} is in qua"):
        quarantine.check(peer())
    quarantine.check(peer(serial=SERIAL + 1))
    quarantine.check_server(SHOP)
    remove(path, "AB12CD34EF")
    assert soon(lambda: not refuses(quarantine))


@pytest.mark.slow
def test_a_server_on_the_list_is_not_to_be_called(path):
    add(path)
    with Quarantine.open(path) as quarantine:
        with pytest.raises(
            Unavailable, match=r"in quarantine since .*: its laptop"
        ) as e:
            quarantine.check_server(SHOP)
        assert e.value.public == f"{SHOP} may not be called now"
        quarantine.check_server(CLI)


@pytest.mark.slow
def test_a_change_is_noticed_within_a_quarter_of_a_second(quarantine, path):
    told = threading.Event()
    unsubscribe = quarantine.subscribe(told.set)
    took = []
    for subject in (SHOP, CLI, "ab", "cd"):
        told.clear()
        add(path, subject)
        began = time.monotonic()
        assert told.wait(5)
        took.append(time.monotonic() - began)
    assert sorted(took)[1] < 0.25
    assert refuses(quarantine)
    unsubscribe()
    told.clear()
    remove(path)
    assert soon(lambda: not refuses(quarantine, peer(serial=1)))
    assert not told.is_set()


@pytest.mark.slow
def test_two_changes_within_one_tick_of_the_clock_are_both_noticed(quarantine, path):
    """Same inode, same size, same times, as on a file system with a coarse clock."""
    add(path, "aaaa")
    assert soon(lambda: refuses(quarantine, peer(serial=0xAAAA)))
    found = path.stat()
    with path.open("r+") as file:
        text = file.read().replace("aaaa", "bbbb")
        file.seek(0)
        file.write(text)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert soon(lambda: refuses(quarantine, peer(serial=0xBBBB)))


def test_it_can_be_closed_twice(path):
    quarantine = Quarantine.open(path)
    quarantine.close()
    quarantine.close()
    assert not quarantine._thread.is_alive()


# --- the file ---------------------------------------------------------------------


LEFT = {"quarantine.json", "quarantine.json.begun", ".quarantine.lock"}


def test_the_file_is_private_and_says_who_what_when_and_why(path):
    add(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (entry,) = quarantine_file.read(path)
    document = json.loads(path.read_text())
    assert document == {
        "version": 1,
        "entries": [
            {
                "subject": SHOP,
                "reason": "its laptop was stolen",
                "added_at": entry.added_at,
                "by": "me",
            }
        ],
    }
    assert {one.name for one in path.parent.iterdir()} == LEFT


def test_a_folder_that_is_not_there_is_made_private(private):
    path = private / "state" / "quarantine.json"
    assert quarantine_file.read(path) is None
    add(path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_many_edits_at_once_lose_nothing(path):
    threads = [
        threading.Thread(target=add, args=(path, f"{n + 1:x}")) for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(quarantine_file.read(path)) == 12


@pytest.mark.slow
def test_an_edit_waits_for_another_for_a_bounded_time(path, monkeypatch):
    monkeypatch.setattr(quarantine_file, "LOCK_S", 0.1)
    with (
        quarantine_file._locked(path.parent),
        pytest.raises(IdentityError, match=r"locked by another edit for 0\.1 s"),
    ):
        add(path)


def test_an_edit_that_would_change_nothing_is_refused(path):
    with pytest.raises(IdentityError, match=f"{SHOP} is not in quarantine"):
        remove(path)
    add(path)
    with pytest.raises(IdentityError, match=f"{SHOP} is in quarantine already"):
        add(path)


@pytest.mark.parametrize(
    ("subject", "match"),
    [
        ("", "neither a SPIFFE ID .* nor a certificate's serial"),
        ("shop", "neither"),
        ("0x1f", "neither"),
        ("1_0", "neither"),
        (" 1", "neither"),
        ("٣", "neither"),
        ("-1", "neither"),
        ("f" * 41, "at most 40 hex digits"),
        ("SPIFFE://td.example/a", "neither"),
        ("spiffe://td.example", "needs a path"),
        (SHOP + "\n", "a path has only letters"),
    ],
)
def test_what_is_neither_an_id_nor_a_serial_is_refused(path, subject, match):
    with pytest.raises(IdentityError, match=match):
        add(path, subject)
    assert not path.exists()


@pytest.mark.parametrize("reason", ["", "x" * 201, "two\nlines", "\x1b[2J"])
def test_a_reason_is_one_short_printable_line(path, reason):
    with pytest.raises(IdentityError, match="reason: expected 1 to 200 printable"):
        add(path, reason=reason)


def test_the_list_is_bounded(path, monkeypatch):
    monkeypatch.setattr(quarantine_entry, "MAX_ENTRIES", 2)
    add(path, "1")
    add(path, "2")
    with pytest.raises(IdentityError, match=r"full \(2 entries"):
        add(path, "3")
    assert len(quarantine_file.read(path)) == 2
    monkeypatch.setattr(quarantine_entry, "MAX_ENTRIES", 1)
    with pytest.raises(IdentityError, match="2 entries, at most 1 are allowed"):
        quarantine_file.read(path)
    monkeypatch.setattr(quarantine_file, "MAX_FILE_BYTES", 100)
    with pytest.raises(IdentityError, match="over 100 bytes"):
        quarantine_file.read(path)


def listing(*entries):
    return json.dumps({"version": 1, "entries": entries})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "the list: not JSON"),
        ("\udcff", "the list: not JSON"),
        ("[" * 100_000, "the list: not JSON"),
        ("[]", "the list: expected a JSON object"),
        ("null", "the list: expected a JSON object"),
        ("{}", "expected {.version"),
        ('{"version": 2, "entries": []}', "expected {.version"),
        ('{"version": 1, "entries": {}}', "expected {.version"),
        ('{"version": 1, "entries": [], "more": 1}', "expected {.version"),
        ('{"version": 1, "entries": [], "entries": []}', "a name occurs twice"),
        (listing("x"), "entry 0: expected just subject, reason, added_at, by"),
        (listing(GOOD, {**GOOD, "x": ""}), "entry 1: expected just"),
        (listing({**GOOD, "by": 7}), "entry 0: expected texts only"),
        (listing({**GOOD, "by": ""}), "entry 0: by: expected 1 to 2048"),
        (listing({**GOOD, "subject": "AB"}), "'AB' is not written canonically"),
        (listing({**GOOD, "subject": "0ab"}), "'0ab' is not written canonically"),
        (listing({**GOOD, "subject": "x"}), "entry 0: 'x' is neither"),
        (listing({**GOOD, "added_at": "today"}), "'today' is no time in UTC"),
        (listing({**GOOD, "added_at": "2026-01-31T12:00:00"}), "no time in UTC"),
        (listing({**GOOD, "added_at": "2026-01-31T12:00:00+01:00"}), "no time in UTC"),
        (listing(GOOD, GOOD), "a subject is listed twice"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_by_name(path, text, match):
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(IdentityError, match=f"{path}: .*{match}"):
        quarantine_file.read(path)
    with pytest.raises(IdentityError, match="the quarantine list cannot be used: "):
        Quarantine.open(path)


def hostile(path):
    """Ways to spoil a good file, and what is said of each."""
    other = path.parent / "other.json"
    yield (
        "truncated",
        lambda: path.write_text(path.read_text()[:-5]),
        "the list: not JSON",
    )
    yield "emptied", lambda: path.write_text(""), "the list: not JSON"
    yield "removed", path.unlink, "is gone, and with it who was shut out; put it back"
    yield (
        "a link",
        lambda: (path.rename(other), path.symlink_to(other)),
        "is a link to .* only those of a Kubernetes volume",
    )
    yield (
        "a link to nowhere",
        lambda: (path.unlink(), path.symlink_to("/nowhere")),
        "is a link to '/nowhere'",
    )
    yield "a pipe", lambda: (path.unlink(), os.mkfifo(path)), "not a regular file"
    yield "a folder", lambda: (path.unlink(), path.mkdir()), "not a regular file"
    yield (
        "writable by others",
        lambda: path.chmod(0o622),
        "has mode 0622: others can change it; expected none of 0022",
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
def test_everybody_is_refused_while_the_file_is_spoiled(
    quarantine, path, number, caplog
):
    add(path, "1")
    assert soon(lambda: refuses(quarantine, peer(serial=1)))
    _, spoil, match = list(hostile(path))[number]
    text = path.read_text()
    with caplog.at_level(logging.ERROR):
        spoil()
        assert soon(lambda: refuses(quarantine, peer(CLI)))
        assert soon(lambda: "everybody is refused" in caplog.text)
    with pytest.raises(Unavailable, match=match) as caught:
        quarantine.check(peer(CLI))
    assert caught.value.public == "this service cannot judge who may call now"
    with pytest.raises(Unavailable, match=match):
        quarantine.check_server(CLI)
    assert str(path) in caught.value.reason
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
    assert soon(lambda: not refuses(quarantine, peer(CLI)))
    assert refuses(quarantine, peer(serial=1))


@ROOT_ONLY
def test_a_file_or_folder_of_another_user_is_refused(path, monkeypatch):
    add(path)
    os.chown(path, 4242, 4242)
    with pytest.raises(IdentityError, match=f"{path} belongs to uid 4242"):
        quarantine_file.read(path)
    os.chown(path, 0, 0)
    os.chown(path.parent, 4242, 4242)
    with pytest.raises(IdentityError, match=f"{path.parent} belongs to uid 4242"):
        quarantine_file.read(path)
    with pytest.raises(IdentityError, match="belongs to uid 4242"):
        add(path, CLI)
    os.chown(path.parent, 0, 0)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(IdentityError, match="who could not read what uid 4242 writes"):
        add(path, CLI)


@pytest.mark.parametrize("above", [0, 1])
def test_a_folder_that_others_may_write_to_is_refused(path, above):
    path = path.parent / "deep" / "quarantine.json"
    add(path)
    folder = path.parents[above]
    folder.chmod(0o770)
    for use in (lambda: quarantine_file.read(path), lambda: add(path, CLI)):
        with pytest.raises(IdentityError, match=f"{folder} has mode 0770: others can"):
            use()
    folder.chmod(0o700)
    assert len(quarantine_file.read(path)) == 1


@pytest.mark.slow
def test_a_list_in_a_kubernetes_volume_is_followed_and_edited_there_alone(path):
    volume = path.parent / "volume"
    version = volume / "..2026"
    version.mkdir(parents=True)
    add(path)
    path.rename(version / path.name)
    (volume / "..data").symlink_to("..2026")
    listed = volume / path.name
    listed.symlink_to(f"..data/{path.name}")
    assert [one.subject for one in quarantine_file.read(listed)] == [SHOP]
    with pytest.raises(IdentityError, match="is a link: edit what it leads to"):
        add(listed, CLI)
    with Quarantine.open(listed) as quarantine:
        assert refuses(quarantine, peer(SHOP))
        assert not refuses(quarantine, peer(CLI))
        # kubelet's way: a new directory beside the old one, then one rename.
        newer = volume / "..2027"
        newer.mkdir()
        another = path.parent / "another" / path.name
        add(another, CLI)
        another.rename(newer / path.name)
        (volume / "..new").symlink_to("..2027")
        (volume / "..new").rename(volume / "..data")
        assert soon(lambda: refuses(quarantine, peer(CLI)))
        assert not refuses(quarantine, peer(SHOP))
    (newer / path.name).unlink()
    with pytest.raises(IdentityError, match="is gone, and with it who was shut out"):
        Quarantine.open(listed)


@pytest.mark.slow
def test_everybody_is_let_in_again_once_the_folder_is_mended(path):
    path = path.parent / "deep" / "quarantine.json"
    add(path, "1")
    with Quarantine.open(path) as quarantine:
        path.parent.chmod(0o777)
        assert soon(lambda: refuses(quarantine, peer(CLI)))
        path.parent.chmod(0o700)
        assert soon(lambda: not refuses(quarantine, peer(CLI)))
        assert refuses(quarantine, peer(serial=1))


@ROOT_ONLY
def test_a_link_in_another_users_place_is_refused(path):
    other = path.parent / "other"
    add(path.parent / "real" / "quarantine.json")
    other.mkdir()
    (other / "hop").symlink_to(path.parent / "real")
    os.chown(other, 4242, 4242)
    (path.parent / "mine").symlink_to(other / "hop")
    with pytest.raises(IdentityError, match=f"{other} belongs to uid 4242"):
        quarantine_file.read(path.parent / "mine" / "quarantine.json")
    os.chown(other, 0, 0)
    assert quarantine_file.read(path.parent / "mine" / "quarantine.json")
    (path.parent / "mine").unlink()
    (path.parent / "mine").symlink_to("mine")
    with pytest.raises(IdentityError, match="Too many levels of symbolic links"):
        quarantine_file.read(path.parent / "mine" / "quarantine.json")


def test_an_error_of_the_system_names_the_file(path, monkeypatch):
    path.parent.joinpath("file").touch()
    below = path.parent / "file" / "quarantine.json"
    with pytest.raises(IdentityError, match=r"quarantine\.json: Not a directory"):
        quarantine_file.read(below)
    with pytest.raises(IdentityError, match="cannot be written: "):
        add(below)


def test_a_write_that_fails_leaves_the_old_list_and_nothing_else(path, monkeypatch):
    add(path)
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(IdentityError, match="cannot be written: full"):
        add(path, CLI)
    assert [one.subject for one in quarantine_file.read(path)] == [SHOP]
    assert {one.name for one in path.parent.iterdir()} == LEFT


@pytest.mark.slow
def test_a_list_that_cannot_be_followed_any_more_admits_nobody(
    quarantine, path, monkeypatch
):
    monkeypatch.setattr(Quarantine, "_look", lambda _: 1 / 0)
    assert soon(lambda: refuses(quarantine))
    with pytest.raises(Unavailable, match="ZeroDivisionError"):
        quarantine.check(peer())
    monkeypatch.undo()
    assert soon(lambda: not refuses(quarantine))


# --- the agent's admin socket --------------------------------------------------------


@pytest.fixture
def events():
    return []


@pytest.fixture
def steered(authority, private, path, events):
    def told(kind, fields):
        events.append((kind, dict(fields)))

    rules = Rules(trust_domain="td.example", default_id=CLI)
    with Agent(
        authority,
        private,
        rules,
        admin_ids=(CLI,),
        extra_ops=quarantine_operations(path, told),
    ) as agent:
        yield agent.admin_socket


def test_an_admin_edits_the_list_over_the_admin_socket(steered, path, events):
    me = f"pid {os.getpid()}, uid {os.geteuid()}"
    asked = {"op": "quarantine-add", "subject": SHOP, "reason": "stolen"}
    entry = admin(steered, asked)["entry"]
    assert (entry["subject"], entry["reason"], entry["by"]) == (SHOP, "stolen", me)
    assert admin(steered, {"op": "quarantine-list"})["entries"] == [entry]
    assert quarantine_file.read(path)[0].subject == SHOP
    gone = admin(steered, {"op": "quarantine-remove", "subject": SHOP})
    assert gone["subject"] == SHOP
    assert admin(steered, {"op": "quarantine-list"})["entries"] == []
    assert events == [
        ("quarantine-add", entry),
        ("quarantine-remove", {"subject": SHOP, "by": me}),
    ]


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"op": "quarantine-add", "subject": SHOP}, "expected subject and reason"),
        ({"op": "quarantine-add", "subject": 7, "reason": "x"}, "expected subject and"),
        (
            {"op": "quarantine-add", "subject": SHOP, "reason": "x", "by": "root"},
            "expected subject and reason",
        ),
        ({"op": "quarantine-remove"}, "quarantine-remove: expected subject"),
        ({"op": "quarantine-remove", "subject": SHOP}, "is not in quarantine"),
        ({"op": "quarantine-list", "x": 1}, "expected no more than its op"),
        ({"op": "quarantine-add", "subject": "x", "reason": "x"}, "neither a SPIFFE"),
    ],
)
def test_requests_that_are_not_understood_change_nothing(
    steered, path, events, request_, match
):
    with pytest.raises(IdentityError, match=match):
        admin(steered, request_)
    assert not path.exists()
    assert events == []


def test_what_cannot_be_audited_is_not_changed(path):
    def full(_kind, _fields):
        raise AuditError("the log is full")

    with pytest.raises(AuditError):
        quarantine_file.add(path, SHOP, reason="x", by="me", on_event=full)
    assert not path.exists()
    add(path)
    with pytest.raises(AuditError):
        quarantine_file.remove(path, SHOP, by="me", on_event=full)
    assert len(quarantine_file.read(path)) == 1


def test_the_first_entry_never_looks_like_a_list_that_was_lost(path, monkeypatch):
    seen: list[object] = []
    replace = quarantine_file._replace

    def looked(*given):
        seen.append(quarantine_file.read(path))
        replace(*given)
        seen.append(quarantine_file.read(path))

    monkeypatch.setattr(quarantine_file, "_replace", looked)
    add(path)
    assert seen[0] is None
    assert len(seen[1]) == 1


def test_a_first_list_that_comes_between_two_looks_is_read(path, monkeypatch):
    had_begun = quarantine_file._had_begun

    def meanwhile(_):
        monkeypatch.setattr(quarantine_file, "_had_begun", had_begun)
        add(path)
        return True

    monkeypatch.setattr(quarantine_file, "_had_begun", meanwhile)
    assert len(quarantine_file.read(path)) == 1
