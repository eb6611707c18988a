"""Who is my peer? ztserve beside `spiffe`, pyOpenSSL and cryptography alone.

    python -m bench.identity [--quick] [--json FILE]

Each call gets DER as it comes from TLS and takes it apart anew, but for `known`, the
memory of a `PeerVerifier`. The arms take turns of 50 calls, so that what else the
machine does hits all alike; one thread, EC P-256 throughout.

============  ====================================================================
ztserve       the path and every rule of X509-SVID
cryptography  the path alone (RFC 5280), roots prepared
pyOpenSSL     the path alone, X509_STRICT, roots prepared
spiffe        the leaf's rules alone: it verifies no path (X509Svid.parse_raw)
============  ====================================================================
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from time import perf_counter_ns
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from OpenSSL import crypto
from spiffe import SpiffeId as OtherSpiffeId
from spiffe import X509Svid

from bench import report
from ztserve import types
from ztserve.identity import PeerVerifier, SpiffeId
from ztserve.testing import ThrowAwayAuthority

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ztserve.identity import Svid

ME = "spiffe://dev.ztserve.internal/ns/ml-inference/sa/inference-service"
TURN = 50
"""Calls of an arm before the next one's."""
GOALS_US = {"new": 150.0, "known": 5.0}
BASES = ("cryptography", "pyOpenSSL", "spiffe")

Arms = dict[tuple[str, str], "Callable[[], object]"]


def arms() -> Arms:
    """Return what is measured, by case and arm."""
    authority = ThrowAwayAuthority("dev.ztserve.internal")
    through = authority.intermediate("spiffe://dev.ztserve.internal").forge(ME)
    known = PeerVerifier(authority.bundles)
    svid = authority.issue(ME)
    return {
        **_verifiers("new", svid, authority),
        **_verifiers("via intermediate", through, authority),
        ("known", "ztserve"): lambda: known.verify(svid.chain_der),
        ("SPIFFE ID", "ztserve"): lambda: SpiffeId.parse(ME),
        ("SPIFFE ID", "spiffe"): lambda: OtherSpiffeId(ME),
    }


def _verifiers(case: str, svid: Svid, authority: ThrowAwayAuthority) -> Arms:
    chain, key = svid.chain_der, svid.key_der()
    forgetful = PeerVerifier(authority.bundles, capacity=0)
    root = x509.load_der_x509_certificate(authority.bundle[0])
    policy = PolicyBuilder().store(Store([root]))
    store = crypto.X509Store()
    store.add_cert(crypto.X509.from_cryptography(root))
    store.set_flags(crypto.X509StoreFlags.X509_STRICT)

    def cryptography() -> object:
        leaf, *others = (x509.load_der_x509_certificate(der) for der in chain)
        now = datetime.fromtimestamp(types.now().timestamp(), UTC)
        return policy.time(now).build_client_verifier().verify(leaf, others)

    def openssl() -> object:
        leaf, *others = (
            crypto.load_certificate(crypto.FILETYPE_ASN1, der) for der in chain
        )
        context = crypto.X509StoreContext(store, leaf, others)
        return context.get_verified_chain()

    return {
        (case, "ztserve"): lambda: forgetful.verify(chain),
        (case, "cryptography"): cryptography,
        (case, "pyOpenSSL"): openssl,
        (case, "spiffe"): lambda: X509Svid.parse_raw(b"".join(chain), key),
    }


def measure(measured: Arms, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Call each in `rounds` turns; return the sorted times in microseconds."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in measured}
    for call in measured.values():
        call()
    for _ in range(rounds):
        for key, call in measured.items():
            for _ in range(TURN):
                begun = perf_counter_ns()
                call()
                times[key].append((perf_counter_ns() - begun) / 1e3)
    return {key: sorted(taken) for key, taken in times.items()}


def figures(taken: Sequence[float]) -> dict[str, float]:
    """Return the metrics of one arm in one case, in microseconds."""
    count = len(taken)
    return {
        "p10_us": taken[count // 10],
        "p50_us": taken[count // 2],
        "p99_us": taken[count * 99 // 100],
    }


def ratio(
    medians: Mapping[tuple[str, str], float], case: str, arm: str, base: str
) -> str:
    """Return how many times as fast as `base` this `arm` is in this `case`."""
    if base == arm or (case, base) not in medians:
        return "-"
    return f"{report.number(medians[case, base] / medians[case, arm])}x"


def main(given: Sequence[str] | None = None) -> int:
    """Run the bench; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.identity")
    parser.add_argument("--quick", action="store_true", help="4 turns each, not 80")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(given)
    print("\n".join(report.machine()), flush=True)
    rounds = 4 if arguments.quick else 80
    values = {key: figures(taken) for key, taken in measure(arms(), rounds).items()}
    medians = {key: metrics["p50_us"] for key, metrics in values.items()}
    rows = [
        [
            case,
            arm,
            *map(report.number, metrics.values()),
            *(ratio(medians, case, arm, base) for base in BASES),
        ]
        for (case, arm), metrics in values.items()
    ]
    columns = ["case", "arm", "p10 us", "p50 us", "p99 us"]
    columns += [f"x {base}" for base in BASES]
    report.show(f"{rounds} turns of {TURN} calls", columns, rows)
    for case, goal in GOALS_US.items():
        median = report.number(medians[case, "ztserve"])
        print(f"{case} peer: {median} us, the goal is {goal:g} us")
    if arguments.json:
        written = [
            report.Row(arm=arm, case=case, metric=metric, value=value, unit="us")
            for (case, arm), metrics in values.items()
            for metric, value in metrics.items()
        ]
        report.write(arguments.json, written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
