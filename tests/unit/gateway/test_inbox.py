import pytest

from ztserve.gateway.head import Malformed
from ztserve.gateway.inbox import Inbox


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
def test_heads_and_bodies_come_out_however_they_arrived(step):
    data = b"GET / HTTP/1.1\r\nHost: g\r\n\r\nbodyPOST x\r\n\r\nrest"
    inbox, found = Inbox(100), []
    for at in range(0, len(data), step):
        inbox.add(data[at : at + step])
        if len(found) in (0, 2) and (head := inbox.head()) is not None:
            found.append(head)
        if len(found) == 1 and (body := inbox.body(4)) is not None:
            found.append(body)
    while len(found) in (0, 2) and (head := inbox.head()) is not None:
        found.append(head)
    assert found == [b"GET / HTTP/1.1\r\nHost: g", b"body", b"POST x"]
    assert inbox.body(5) is None
    assert inbox.body(4) == b"rest"
    assert len(inbox) == 0


def test_a_head_has_a_bound_whether_it_ends_or_not():
    inbox = Inbox(10)
    inbox.add(b"x" * 10)
    assert inbox.head() is None
    inbox.add(b"\r\n\r\n")
    assert inbox.head() == b"x" * 10
    inbox.add(b"x" * 11 + b"\r\n\r\n")
    with pytest.raises(Malformed, match="larger than 10 bytes"):
        inbox.head()
    inbox = Inbox(10)
    inbox.add(b"x" * 11)
    with pytest.raises(Malformed, match="larger than 10 bytes"):
        inbox.head()
