import pytest

from ztserve.errors import InvalidInput
from ztserve.transport.arrival import new_id, sorted_out, source


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
    given = (("a", "1"), ("zt-x", "2"), ("b-bin", b"3"), ("zt-caller-bin", b"4"))
    headers, asserted = sorted_out((*given, ("a", "5")), 100)
    assert dict(headers) == {"a": "1,5"}
    assert asserted == [b"4"]


def test_more_metadata_than_the_limit_is_refused() -> None:
    assert sorted_out((("a", "x" * 9),), 10)
    with pytest.raises(InvalidInput, match="more than 10 bytes of metadata"):
        sorted_out((("a", "x" * 9), ("b", "")), 10)


def test_ids_are_128_random_bits() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in ids)
