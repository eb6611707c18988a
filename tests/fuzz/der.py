"""Just enough DER to take a certificate apart, break it, and put it together again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

SEQUENCE, SET, CONTEXT, OCTET_STRING, URI_NAME = 0x30, 0x31, 0xA0, 0x04, 0x86
BYTES_OF_CHOICE = (0x00, 0x01, 0x7F, 0x80, 0xFF)


class Node:
    """One TLV. `body` is its bytes, or the nodes within; `der` is how it is written."""

    __slots__ = ("body", "count", "der", "tag")

    def __init__(
        self, tag: int, body: bytes | tuple[Node, ...], length: bytes = b""
    ) -> None:
        self.tag, self.body = tag, body
        if isinstance(body, tuple):
            self.count = 1 + sum([node.count for node in body])
            body = b"".join([node.der for node in body])
        else:
            self.count = 1
        self.der = bytes((tag,)) + (length or _length(len(body))) + body


def parse(data: bytes) -> tuple[Node, ...]:
    """Return the TLVs in `data`. Raises ValueError where that is not DER."""
    nodes, at = [], 0
    while at < len(data):
        if at + 2 > len(data):
            raise ValueError("cut short")
        tag, size, begun = data[at], data[at + 1], at + 1
        at += 2
        if size >= 0x80:
            octets = size & 0x7F
            size, at = int.from_bytes(data[at : at + octets]), at + octets
        if data[begun:at] != _length(size):
            raise ValueError("a length that is not DER")
        if at + size > len(data):
            raise ValueError("cut short")
        body = data[at : at + size]
        at += size
        nodes.append(Node(tag, _inside(tag, body)))
    return tuple(nodes)


def _inside(tag: int, body: bytes) -> bytes | tuple[Node, ...]:
    # An octet string may be an extension's value, which is DER again.
    nested = tag == OCTET_STRING and body[:1] in (b"\x30", b"\x03")
    if nested or tag in (SEQUENCE, SET) or tag & 0xE0 == CONTEXT:
        try:
            return parse(body)
        except ValueError:
            pass  # not DER: a piece like any other
    return body


def _length(size: int) -> bytes:
    if size < 0x80:
        return bytes((size,))
    octets = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes((0x80 | len(octets),)) + octets


def _way(root: Node, random: Random) -> list[tuple[Node, int]]:
    """Return the way down to any node below `root`: parents, and which child."""
    left, node = random.randrange(1, root.count), root
    way = []
    while left:
        left -= 1
        for index, child in enumerate(node.body):
            if left < child.count:
                way.append((node, index))
                node = child
                break
            left -= child.count
    return way


def _any(root: Node, random: Random) -> Node:
    if root.count == 1:
        return root
    parent, index = _way(root, random)[-1]
    return parent.body[index]


def mutate(root: Node, donor: Node, random: Random) -> Node:
    """Return `root` with one thing within broken, perhaps by a piece of `donor`."""
    if root.count == 1:
        return root
    way = _way(root, random)
    parent, index = way.pop()
    siblings = list(parent.body)
    _break(siblings, index, donor, random)
    length = _wrong_length(parent, random) if random.random() < 0.02 else b""
    node = Node(parent.tag, tuple(siblings), length)
    for above, at in reversed(way):
        node = Node(above.tag, (*above.body[:at], node, *above.body[at + 1 :]))
    return node


def _break(siblings: list[Node], index: int, donor: Node, random: Random) -> None:
    node = siblings[index]
    match random.randrange(9):
        case 0:
            del siblings[index]
        case 1:
            siblings.insert(random.randrange(len(siblings) + 1), node)
        case 2:
            other = random.randrange(len(siblings))
            siblings[index], siblings[other] = siblings[other], node
        case 3:
            siblings[index] = _any(donor, random)
        case 4:
            siblings.insert(index, _any(donor, random))
        case 5:
            tag = random.choice((node.tag ^ (1 << random.randrange(8)), URI_NAME))
            siblings[index] = Node(tag, node.body)
        case 6:
            siblings[index] = Node(node.tag, node.body, _wrong_length(node, random))
        case 7 if random.random() < 0.1:
            copies = min(2 ** random.randrange(1, 15), 30_000 // len(node.der))
            siblings[index:index] = [node] * copies
        case _:
            body = node.body
            if isinstance(body, tuple):
                body = b"".join([child.der for child in body])
            siblings[index] = Node(node.tag, change(body, random))


def _wrong_length(node: Node, random: Random) -> bytes:
    size = len(node.der)
    return random.choice(
        (
            b"\x80",
            b"\x84" + size.to_bytes(4),
            b"\x88" + b"\xff" * 8,
            _length(max(size + random.choice((-4, -3, -2, -1, 1)), 0)),
            bytes((random.randrange(256),)),
        )
    )


def change(body: bytes, random: Random) -> bytes:
    """Return `body` changed in one of the ways below."""
    return random.choice((flip, cut, put, repeat))(body, random)


def flip(data: bytes, random: Random) -> bytes:
    """Return `data` with up to three bits or bytes changed."""
    changed = bytearray(data or b"\0")
    for _ in range(random.randrange(1, 4)):
        at = random.randrange(len(changed))
        if random.random() < 0.7:
            changed[at] ^= 1 << random.randrange(8)
        else:
            changed[at] = random.choice(BYTES_OF_CHOICE)
    return bytes(changed)


def cut(data: bytes, random: Random) -> bytes:
    """Return `data` without a piece of it."""
    at = random.randrange(len(data) + 1)
    return data[:at] + data[at + random.randrange(1, 9) :]


def put(data: bytes, random: Random) -> bytes:
    """Return `data` with up to eight random bytes more."""
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.randrange(1, 9)) + data[at:]


def repeat(data: bytes, random: Random) -> bytes:
    """Return `data` with a piece of it twice."""
    at = random.randrange(len(data) + 1)
    return data[: at + random.randrange(1, 33)] + data[at:]
