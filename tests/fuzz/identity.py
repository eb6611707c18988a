"""Fuzz of the pure functions that judge what others send.

    python -m tests.fuzz.identity [--count N] [--seed N] [--json FILE]

Certificates are taken apart, broken in one to three places and put together again, two
in three with a true signature; chains are shuffled, doubled and mixed; bundles and IDs
are broken likewise. Each must give a value or the named error within 50 ms (of CPU: the
machine may be shared), and what is accepted must pass `tests.fuzz.oracle`. A finding is
printed with all its bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from rich.progress import MofNCompleteColumn, Progress

from tests.fuzz import oracle
from tests.fuzz.inputs import Inputs
from tests.fuzz.seeds import ID, KEYS, NOW
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import SpiffeId, verify_peer
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.svid import Material, read_identity

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT_S = 0.05
MAX_FINDINGS = 20
MISTAKES = (TypeError, AttributeError, LookupError, NameError, ArithmeticError)
"""A refusal for one of these hides a mistake of ours."""
COMPARED = 0.1
"""The part of the refusals that the oracle is asked about as well."""
LEAF_KEY = KEYS["leaf"].private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


@dataclass
class Tally:
    """What a run has seen."""

    seed: int
    inputs: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    stricter: Counter[str] = field(default_factory=Counter)
    """Refusals of what the oracle would allow, by the reason given."""
    slowest_ms: dict[str, float] = field(default_factory=dict)
    findings: list[dict[str, str]] = field(default_factory=list)


class Fuzz:
    """The functions, each with its inputs and what must hold of its answer."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.inputs = Inputs(self.random)
        self.tally = Tally(seed)

    def step(self) -> None:
        """Make one input, give it to its function, judge the answer."""
        (kind,) = self.random.choices(
            (self.spiffe_id, self.chain, self.material, self.bundle), (15, 60, 12, 13)
        )
        kind()

    # --- the four kinds --------------------------------------------------------

    def spiffe_id(self) -> None:
        text = self.inputs.text(self.random.choice(self.inputs.ids))
        accepted = self._call("id", partial(SpiffeId.parse, text), IdentityError, text)
        why = oracle.why_not_an_id(text)
        if bool(accepted) == bool(why):
            self._found("id", f"accepted={bool(accepted)}, oracle: {why}", text)

    def chain(self) -> None:
        chain, bundles = self.inputs.chain(), self.inputs.bundles()
        call = partial(verify_peer, chain, bundles, now=NOW)
        peer = self._call("chain", call, Unauthenticated, (chain, bundles))
        if peer is not None:
            why = oracle.why_not_a_peer(chain, bundles, NOW)
            if why or peer.id not in oracle.Certificate(chain[0]).names(0x86):
                self._found("chain", why or "not the leaf's ID", (chain, bundles))
        elif len(chain) < 5 and self.random.random() < COMPARED:
            self._compare(call, oracle.why_not_a_peer(chain, bundles, NOW))

    def _compare(self, call, why: str) -> None:
        if why:
            return
        try:
            call()
        except Unauthenticated as error:
            words = error.reason.replace(ID, "").split(" (enc")[0]
            self.tally.stricter[re.sub(r"[0-9]+", "N", words)[:100]] += 1

    def material(self) -> None:
        chain, bundles = self.inputs.chain(), self.inputs.bundles()
        joined = self.inputs.octets(b"".join(chain), 0.1)
        roots = self.inputs.octets(b"".join(bundles.get("a.example", ())), 0.1)
        key = self.inputs.octets(LEAF_KEY, 0.1)
        foreign = {"spiffe://b.example": b"".join(bundles.get("b.example", ()))}
        told = self.inputs.text(ID) if self.random.random() < 0.05 else ID
        material = Material(told, joined, key, roots, foreign)
        call = partial(read_identity, material, now=NOW)
        identity = self._call("material", call, IdentityError, material)
        if identity is None:
            return
        why = oracle.why_not_a_peer(identity.svid.chain_der, identity.bundles, NOW)
        leaf = oracle.Certificate(identity.svid.chain_der[0])
        if b"".join(identity.svid.chain_der) != joined or told not in leaf.names(0x86):
            why = "not the chain or the ID of the material"
        if leaf.key().public_numbers() != KEYS["leaf"].public_key().public_numbers():
            why = "the key is not the leaf's"
        if why:
            self._found("material", why, material)

    def bundle(self) -> None:
        document = self.random.choice(self.inputs.documents)
        if self.random.random() < 0.5:
            document = self.inputs.octets(document, 1.0)
        else:
            document = self.inputs.document(json.loads(document))
        call = partial(TrustBundle.parse, document, "a.example")
        bundle = self._call("bundle", call, IdentityError, document)
        for root in bundle.x509_authorities if bundle else ():
            why = oracle.why_not_a_signer(root)
            if why:
                self._found("bundle", why, document)

    # --- what judges them ------------------------------------------------------

    def _call(self, kind, call, error, what):
        """Return the value of `call`, None where it raised `error`."""
        value, took = self._timed(kind, call, error, what)
        if took > LIMIT_S:  # once more: a collection of garbage may have been due
            took = min(took, self._timed(kind, call, error, what)[1])
        if took > LIMIT_S:
            self._found(kind, f"took {took * 1e3:.0f} ms", what)
        slowest = self.tally.slowest_ms
        slowest[kind] = max(slowest.get(kind, 0.0), round(took * 1e3, 2))
        self.tally.inputs[kind] += 1
        self.tally.accepted[kind] += value is not None
        return value

    def _timed(self, kind, call, error, what):
        value, begun = None, time.thread_time()
        try:
            value = call()
        except error as refusal:
            cause = refusal.__cause__
            while cause is not None:
                if isinstance(cause, MISTAKES) and _is_ours(cause):
                    self._found(kind, f"behind the refusal: {cause!r}", what)
                cause = cause.__cause__
        except KeyboardInterrupt:
            raise
        except BaseException as other:  # a panic of a parser is no Exception
            self._found(kind, f"{type(other).__name__}: {other}", what)
        return value, time.thread_time() - begun

    def _found(self, kind: str, why: str, what: object) -> None:
        self.tally.findings.append({"kind": kind, "why": why, "input": repr(what)})


def _is_ours(error: BaseException) -> bool:
    """Whether `error` was raised by our code, not by a parser's behind it."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals["__name__"].startswith("ztserve.")


def run(count: int, seed: int, progress: Progress | None = None) -> Tally:
    """Try `count` inputs; the same `seed` makes the same ones."""
    fuzz = Fuzz(seed)
    task = progress.add_task("inputs", total=count) if progress else None
    for number in range(1, count + 1):
        fuzz.step()
        if progress and (number % 500 == 0 or number == count):
            progress.update(
                task,
                completed=number,
                description=f"inputs, {len(fuzz.tally.findings)} findings",
            )
        if len(fuzz.tally.findings) >= MAX_FINDINGS:
            break
    return fuzz.tally


def main(given: Sequence[str] | None = None) -> int:
    """Run the fuzz; return 1 where it found something."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.identity")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the tally there")
    arguments = parser.parse_args(given)
    begun = time.monotonic()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns) as progress:
        tally = run(arguments.count, arguments.seed, progress)
    total, took = sum(tally.inputs.values()), time.monotonic() - begun
    print(f"{total:,} inputs in {took:.0f} s, {total / took:,.0f}/s, seed {tally.seed}")
    for kind, number in sorted(tally.inputs.items()):
        print(
            f"  {kind}: {number:,}, accepted {tally.accepted[kind]:,}, "
            f"slowest {tally.slowest_ms[kind]} ms"
        )
    print(f"  refused though the oracle would not: {tally.stricter.total():,}")
    for reason, number in tally.stricter.most_common(12):
        print(f"    {number:,} {reason}")
    for finding in tally.findings:
        print(f"FOUND {finding['kind']}: {finding['why']}\n  {finding['input']}")
    if arguments.json:
        figures = vars(tally) | {"total": total, "seconds": took}
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
