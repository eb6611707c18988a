"""Broken IDs, chains, bundles and documents, made of the corpus."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import TYPE_CHECKING

from tests.fuzz import der
from tests.fuzz.seeds import ALGORITHM, CORPUS, KEYS

if TYPE_CHECKING:
    from random import Random

PIECES = ("/", "//", "/.", "/..", ".", "\n", "\0", "%41", "é", "A", "@", ":", "?", "#")


class Inputs:
    """The corpus in memory, and how each kind of input is broken."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.ids = json.loads((CORPUS / "ids.json").read_text())
        self.documents = [path.read_bytes() for path in sorted(CORPUS.glob("*.json"))]
        self.chains = [
            der.parse(p.read_bytes()) for p in sorted(CORPUS.glob("*.chain"))
        ]
        (self.root_a,), (self.root_b,) = (
            der.parse((CORPUS / f"{name}.example.root").read_bytes()) for name in "ab"
        )

    def text(self, text: str) -> str:
        for _ in range(self.random.randrange(4)):
            at = self.random.randrange(len(text) + 1)
            piece = self.random.choice(
                (*PIECES, "", text[at : at + 9], chr(self.random.randrange(0x110000)))
            )
            text = text[:at] + piece + text[at + self.random.randrange(3) :]
        return text

    def octets(self, data: bytes, chance: float) -> bytes:
        return der.change(data, self.random) if self.random.random() < chance else data

    def chain(self) -> list[bytes]:
        nodes = list(self.random.choice(self.chains))
        for _ in range(self.random.randrange(1, 4)):
            self._break_chain(nodes)
        chain = [node.der for node in nodes]
        if chain and self.random.random() < 0.15:
            at = self.random.randrange(len(chain))
            chain[at] = der.change(chain[at], self.random)
        return chain

    def _break_chain(self, nodes: list[der.Node]) -> None:
        if not nodes or self.random.random() < 0.2:
            foreign = self.random.choice(self.random.choice(self.chains))
            match self.random.randrange(4):
                case 0:
                    self.random.shuffle(nodes)
                case 1:
                    nodes.insert(self.random.randrange(len(nodes) + 1), foreign)
                case 2:
                    nodes += nodes[: self.random.randrange(1, 9)]
                case _:
                    del nodes[: self.random.randrange(2)]
        else:
            at = self.random.randrange(len(nodes))
            nodes[at] = self._break_certificate(nodes[at])

    def _break_certificate(self, certificate: der.Node) -> der.Node:
        donor = self.random.choice(self.random.choice(self.chains))
        if self.random.random() < 0.33 or not _is_certificate(certificate):
            return der.mutate(certificate, donor, self.random)
        tbs, algorithm, signature = certificate.body
        tbs = der.mutate(tbs, donor, self.random)
        key = KEYS[self.random.choice(("a", "a", "a", "between", "lower", "b"))]
        if self.random.random() < 0.8:
            key = _signer(tbs) or key
        signed = b"\0" + key.sign(tbs.der, ALGORITHM)
        return der.Node(0x30, (tbs, algorithm, der.Node(signature.tag, signed)))

    def bundles(self) -> dict[str, list[bytes]]:
        a, b = [self.root_a.der], [self.root_b.der]
        if self.random.random() < 0.8:
            return {"a.example": a, "b.example": b}
        match self.random.randrange(5):
            case 0:
                return {"a.example": b, "b.example": a}
            case 1:
                leaf = self.random.choice(self.chains)[0].der
                return {"a.example": [*a, leaf], "b.example": b}
            case 2:
                return {"a.example": [self._break_certificate(self.root_a).der]}
            case 3:
                return {"a.example": [*a, *b], "b.example": b}
            case _:
                return {"a.example": a * self.random.choice((0, 2, 65))}

    def document(self, document: object) -> bytes:
        if isinstance(document, dict) and isinstance(document.get("keys"), list):
            keys = document["keys"]
            for entry in keys:
                name = self.random.choice([*entry, "use", "x5c"])
                value = self.random.choice((None, 0, "", [], {}, "x509-svid", ["AA=="]))
                if self.random.random() < 0.3:
                    entry[name] = value
                elif self.random.random() < 0.2:
                    entry.pop(name, None)
                elif "x5c" in entry and self.random.random() < 0.7:
                    broken = self._break_certificate(self.root_a).der
                    entry["x5c"] = [b64encode(broken).decode()]
            keys += keys[: self.random.randrange(3)]
        return json.dumps(document).encode()


def _is_certificate(node: der.Node) -> bool:
    return (
        isinstance(node.body, tuple) and len(node.body) == 3 and node.body[0].count > 1
    )


def _signer(tbs: der.Node):
    """Return the key of the issuer that `tbs` names, if it is one of ours."""
    issuers = (name for name in KEYS if b"\x0c" + _sized(name) in tbs.der)
    return KEYS.get(next(issuers, ""))


def _sized(name: str) -> bytes:
    return bytes((len(name),)) + name.encode()
