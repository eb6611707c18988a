import pytest

from tests.unit.identity.test_attestation import myself
from ztserve.errors import AuditError, IdentityError
from ztserve.identity.agent.attestation import FalseClaim, Process
from ztserve.identity.agent.events import EACH, MOST, WINDOW_S, Events


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def written():
    return []


@pytest.fixture
def events(written, clock):
    return Events(lambda kind, fields: written.append((kind, fields)), clock=clock)


def test_an_event_says_which_process(events, written):
    me = myself()
    events.tell("svid-issued", me, id="a")
    events.tell("entries-loaded", None, what="b")
    assert written == [
        ("svid-issued", {"pid": me.pid, "uid": me.uid, "id": "a"}),
        ("entries-loaded", {"what": "b"}),
    ]


def test_a_refusal_that_no_honest_process_earns_is_an_alert(events, written):
    events.refused(None, "connection", IdentityError("a"))
    events.refused(None, "admin request", FalseClaim("b"))
    assert written == [
        ("identity-refused", {"what": "connection", "reason": "a"}),
        ("identity-alert", {"what": "admin request", "reason": "b"}),
    ]


def test_a_flood_of_one_process_is_counted_and_hides_no_other(events, written, clock):
    for _ in range(EACH + 5):
        events.tell("identity-refused", Process(1, 1, 0, 0))
    events.tell("identity-refused", Process(2, 1, 0, 0))
    events.tell("identity-alert", Process(1, 1, 0, 0))
    pids = [fields["pid"] for _, fields in written]
    assert pids == [1] * EACH + [2, 1]
    clock.now = WINDOW_S
    events.tell("identity-refused", Process(1, 1, 0, 0))
    assert written[-2:] == [
        ("events-dropped", {"kind": "identity-refused", "count": 5}),
        ("identity-refused", {"pid": 1, "uid": 0}),
    ]


def test_a_flood_of_many_processes_is_bounded_too(events, written):
    for pid in range(MOST + 7):
        events.tell("identity-refused", Process(pid, 1, 0, 0))
    assert len(written) == MOST
    events.close()
    events.close()
    assert written[MOST:] == [
        ("events-dropped", {"kind": "identity-refused", "count": 7})
    ]


def test_what_cannot_be_written_is_told_and_a_refusal_stands(caplog):
    def full(_kind, _fields):
        raise AuditError("the disk is full")

    events = Events(full)
    with pytest.raises(AuditError, match="the disk is full"):
        events.tell("svid-issued", None)
    events.refused(None, "connection", FalseClaim("a lie"))
    assert "identity-alert not audited: " in caplog.text
    assert "a lie" in caplog.text
    assert "the disk is full" in caplog.text
