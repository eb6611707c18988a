from datetime import timedelta

import pytest

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity import FixedSource, Identity

ME = "spiffe://td.example/ns/a/sa/b"


def test_a_fixed_source_gives_its_identity_until_that_expires(authority):
    identity = Identity(authority.issue(ME, ttl_s=60), authority.bundles)
    moment = types.now()
    source = FixedSource(identity, clock=lambda: moment)
    assert source.current() is identity
    moment += timedelta(seconds=62)
    with pytest.raises(IdentityError, match="sa/b expired at"):
        source.current()
    moment -= timedelta(hours=1)
    with pytest.raises(IdentityError, match="sa/b begins at"):
        source.current()


def test_a_fixed_source_takes_listeners_and_lets_them_go(authority):
    source = authority.source(ME)
    unsubscribe = source.subscribe(lambda: pytest.fail("nothing ever changes"))
    unsubscribe()
