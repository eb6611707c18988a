"""What RFC 7541 (HPACK) demands of the blocks that we read and write.

Names of tests begin with ids of tests/contract/http2.toml. Blocks are written by hand:
0x80 an index, 0x40 a literal that is added to the table, 0x00 one that is not, 0x10 one
that never is, 0x20 a size update.
"""

import pytest
from hpack import Decoder, NeverIndexedHeaderTuple

from tests.unit.transport.http2.wire import (
    ANSWER,
    OPEN,
    REQUEST,
    TRAILERS,
    dialled,
    ends,
    headers,
    opened,
    sent,
)
from ztserve.transport.http2 import Code, HeadersReceived, encode, frames

FIRST = b"\xbe"
"""The newest entry of the dynamic table: 62, after the 61 of the static one."""
SECOND = b"\xbf"
ADDED = b"\x40\x01x\x01a"  # x: a, of 34 octets in the table


class Reader:
    """A server that reads blocks, each on a stream of its own."""

    def __init__(self):
        self.server, self.stream = opened(), -1

    def __call__(self, block):
        """The fields of a request that ends with `block`."""
        self.stream += 2
        raw = headers(self.stream, block=block, end=True)
        (event,) = self.server.receive(raw)
        assert isinstance(event, HeadersReceived), event
        self.server.reset(self.stream, Code.CANCEL)
        return event.head.fields[len(REQUEST) - 4 :]

    def fails(self, block):
        """Whether a block is a decoding error."""
        self.stream += 2
        raw = headers(self.stream, block=block, end=True)
        return ends(self.server, raw, Code.COMPRESSION_ERROR)


def test_h2_1a_fields_are_in_their_order_on_both_ways():
    fields = tuple((b"x-%d" % (n * 7 % 5), b"%d" % n) for n in range(12))
    read = Reader()
    assert read(OPEN + encode(fields)) == fields
    mixed = ADDED + b"\x00\x01y\x01b" + FIRST + b"\x10\x01z\x01c"
    assert read(OPEN + mixed) == (
        (b"x", b"a"),
        (b"y", b"b"),
        (b"x", b"a"),
        (b"z", b"c"),
    )
    assert Decoder().decode(encode(fields), raw=True) == list(fields)


def test_h2_3_2a_the_same_entry_may_be_there_twice():
    read = Reader()
    assert read(OPEN + ADDED + ADDED) == ((b"x", b"a"),) * 2
    assert read(OPEN + FIRST + SECOND) == ((b"x", b"a"),) * 2
    assert read.fails(OPEN + b"\xc0")


@pytest.mark.parametrize("index", [FIRST, SECOND, b"\xff\x00", b"\xff\xff\xff\x7f"])
def test_h2_3_3a_an_index_beyond_both_tables_is_refused(index):
    assert Reader().fails(OPEN + index)


def test_h2_3_3a_the_index_of_a_name_is_not_beyond_them_either():
    for literal in (b"\x7e\x01a", b"\x0f\x2f\x01a", b"\x1f\x2f\x01a"):
        assert Reader().fails(OPEN + literal)
        read = Reader()
        read(OPEN + ADDED)
        assert read(OPEN + literal) == ((b"x", b"a"),)
    read = Reader()
    read(OPEN + ADDED)
    assert read.fails(OPEN + SECOND)


def test_h2_3_3a_an_evicted_entry_is_beyond_them():
    read = Reader()
    read(OPEN + ADDED)
    read(b"\x20\x3f\xe1\x1f" + OPEN)  # to 0, and back to 4096
    assert read.fails(OPEN + FIRST)


def test_h2_3_3a_the_oldest_entry_goes_first():
    read = Reader()
    read(b"\x3f\x25" + OPEN + ADDED + b"\x40\x01y\x01b")  # 31 + 37: room for two
    assert read(OPEN + FIRST + SECOND) == ((b"y", b"b"), (b"x", b"a"))
    assert read(OPEN + b"\x40\x01z\x01c" + FIRST + SECOND) == (
        (b"z", b"c"),
        (b"z", b"c"),
        (b"y", b"b"),
    )
    assert read.fails(OPEN + b"\xc0")


@pytest.mark.parametrize("made", [opened, dialled])
def test_h4_2a_h4_2b_we_say_that_our_table_is_empty_and_leave_it_empty(made):
    connection = made()
    decoder = Decoder()
    if made is opened:
        connection.receive(headers(1) + headers(3))
        for stream in (1, 3):
            connection.headers(stream, ANSWER)
            connection.headers(stream, TRAILERS, end=True)
    else:
        for _ in range(4):
            connection.request(OPEN)
    blocks = [f[3] for f in sent(connection) if f[0] == frames.HEADERS]
    assert len(blocks) == 4
    assert blocks[0][:1] == b"\x20"
    for block in blocks:
        decoder.decode(block)
        assert decoder.header_table_size == 0
        assert not decoder.header_table.dynamic_entries


def test_h4_2b_a_size_update_is_at_the_beginning_of_a_block():
    read = Reader()
    read(b"\x20" + OPEN)
    read(b"\x20\x3f\xe1\x1f" + OPEN)
    assert read.fails(OPEN + b"\x20")
    assert Reader().fails(OPEN[:1] + b"\x3f\xe1\x1f" + OPEN[1:])


def test_h4_4a_an_entry_larger_than_the_table_empties_it():
    read = Reader()
    read(b"\x3f\x09" + OPEN + ADDED)  # 31 + 9: 40 octets, of which 34 are used
    assert read(OPEN + FIRST) == ((b"x", b"a"),)
    assert read(OPEN + b"\x40\x01y\x09" + b"b" * 9) == ((b"y", b"b" * 9),)
    assert read.fails(OPEN + FIRST)


@pytest.mark.parametrize(
    "block",
    [
        b"\xff" + b"\x80" * 20 + b"\x00",  # an index with zeros before its end
        b"\xff" + b"\xff" * 20 + b"\x7f",
        b"\x0f" + b"\x80" * 20 + b"\x00\x01a",
        b"\x00\x01x\x7f" + b"\x80" * 20 + b"\x00",  # the length of a value
        b"\x00\x7f" + b"\xff" * 20 + b"\x7f",
        b"\x00\x01x\x7f\xff\xff\xff\xff\x0f",  # 4 GiB
        b"\xff",  # that does not end
        b"\xff\x80",
        b"\x00\x01x\x7f\x80",
        b"\x40",
    ],
)
def test_h5_1a_an_integer_too_long_or_too_large_is_refused(block):
    assert Reader().fails(OPEN + block)


def test_h5_1a_an_integer_of_several_octets_is_read():
    value = b"v" * 1337
    assert Reader()(OPEN + b"\x00\x01x\x7f\xba\x09" + value) == ((b"x", value),)


def huffman(*octets):
    """A field x whose value is Huffman-coded as these octets."""
    return OPEN + b"\x00\x01x" + bytes((0x80 | len(octets), *octets))


def test_h5_2a_h5_2b_padding_up_to_seven_bits_of_ones_is_read():
    read = Reader()
    assert read(huffman(0b00011_111)) == ((b"x", b"a"),)  # a: 00011
    assert read(huffman(0b11111000)) == ((b"x", b"&"),)  # of 8 bits, without padding
    assert read(huffman(0b1111_1000, 0b00011_111)) == ((b"x", b"&a"),)
    assert read(huffman()) == ((b"x", b""),)
    # 0 is 00000, q is 1110110: 12 bits; with ? (1111111100) 22 bits, and 2 of padding.
    assert read(huffman(0b00000_111, 0b0110_1111, 0b111100_11)) == ((b"x", b"0q?"),)


@pytest.mark.parametrize(
    "octets",
    [
        (0xFF,),
        (0b00011_111, 0xFF),
        (0b11111000, 0xFF),
        (0b00011_111, 0xFF, 0xFF),
    ],
)
def test_h5_2a_padding_of_more_than_seven_bits_is_refused(octets):
    assert Reader().fails(huffman(*octets))


@pytest.mark.parametrize("padding", [0b000, 0b110, 0b011, 0b101])
def test_h5_2b_padding_that_does_not_begin_eos_is_refused(padding):
    assert Reader().fails(huffman(0b00011_000 | padding))


@pytest.mark.parametrize(
    "octets",
    [
        (0xFF, 0xFF, 0xFF, 0xFF),  # 30 bits of ones, and two of padding
        (0xFF, 0xFF, 0xFF, 0xFC, 0x7F),
        (0b00011_111, 0xFF, 0xFF, 0xFF, 0xFF),
    ],
)
def test_h5_2c_eos_is_refused(octets):
    assert Reader().fails(huffman(*octets))


def test_h5_2c_eos_in_a_name_is_refused():
    assert Reader().fails(OPEN + b"\x00\x84\xff\xff\xff\xff\x01a")


def test_h6_1a_index_0_is_refused():
    assert Reader().fails(OPEN + b"\x80")
    assert Reader().fails(b"\x80")


@pytest.mark.parametrize(
    "name",
    [
        *(b"authorization", b"cookie", b"set-cookie", b"proxy-authorization"),
        *(b"x-trace-bin", b"-bin"),
    ],
)
def test_h6_2_3b_what_is_not_to_be_indexed_is_always_written_so(name):
    decoder = Decoder()
    for value in (b"secret", b"secret", b"v" * 300):
        plain, secret = decoder.decode(encode(((b"x", b"y"), (name, value))), raw=True)
        assert not isinstance(plain, NeverIndexedHeaderTuple)
        assert isinstance(secret, NeverIndexedHeaderTuple)
        assert tuple(secret) == (name, value)
    assert not decoder.header_table.dynamic_entries


def test_h6_2_3b_what_is_never_indexed_is_read_and_not_added():
    read = Reader()
    assert read(OPEN + b"\x10\x01x\x01a") == ((b"x", b"a"),)
    assert read.fails(OPEN + FIRST)


@pytest.mark.parametrize("update", [b"\x3f\xe2\x1f", b"\x3f\xff\xff\xff\x0f"])
def test_h6_3a_a_table_beyond_the_limit_is_refused(update):
    read = Reader()
    read(b"\x3f\xe1\x1f" + OPEN)  # 4096, the limit itself
    read(b"\x20" + OPEN)
    read(b"\x3f\xe1\x1f" + OPEN)  # to which it may grow again
    assert read.fails(update + OPEN)
