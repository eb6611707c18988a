import pytest

from ztserve.transport.arrival import _sorted, new_id, source


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:127.0.0.1:4000", ("127.0.0.1", 4000)),
        ("ipv6:%5B::1%5D:4000", ("::1", 4000)),
        ("ipv6:[2001:db8::1]:1", ("2001:db8::1", 1)),
        ("unix:", ("unix:", 0)),
        ("", ("", 0)),
    ],
)
def test_the_source_of_a_call(peer: str, expected: tuple[str, int]) -> None:
    assert source(peer) == expected


def test_headers_lose_our_own_and_binary_ones() -> None:
    headers, asserted = _sorted(
        (("a", "1"), ("zt-x", "2"), ("b-bin", b"3"), ("zt-caller-bin", b"4"), ("a", "5"))
    )
    assert dict(headers) == {"a": "1,5"}
    assert asserted == [b"4"]


def test_ids_are_128_random_bits() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in ids)
