from ztserve.transport.arrival import new_id, sorted_out


def test_headers_lose_our_own_and_binary_ones() -> None:
    given = (("a", "1"), ("zt-x", "2"), ("b-bin", b"3"), ("zt-caller-bin", b"4"))
    headers, asserted = sorted_out((*given, ("a", "5")))
    assert dict(headers) == {"a": "1,5"}
    assert asserted == [b"4"]


def test_ids_are_128_random_bits() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(one) == 32 and int(one, 16) >= 0 for one in ids)
