"""What is built of an identity is that of the present one."""

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from ztserve.errors import IdentityError, Unavailable
from ztserve.identity import FixedSource
from ztserve.testing import ThrowAwayAuthority
from ztserve.transport.contexts import Renewed, context_of

ME = "spiffe://dev.ztserve.internal/ns/ml/sa/me"


@pytest.fixture
def source():
    return ThrowAwayAuthority("dev.ztserve.internal").source(ME)


def test_it_is_built_once_for_each_identity(source):
    built = []
    renewed = Renewed(source, lambda identity: built.append(identity), "away")
    first, _ = renewed.current()
    assert renewed.current()[0] is first
    assert built == [first]
    second = ThrowAwayAuthority("dev.ztserve.internal").source(ME).current()
    renewed._source = FixedSource(second)
    assert renewed.current()[0] is second
    assert built == [first, second]


def test_without_an_identity_callers_are_told_so_and_no_more(source):
    class Away:
        def current(self):
            raise IdentityError("the agent is away")

    with pytest.raises(IdentityError, match="the agent is away"):
        Renewed(Away(), lambda identity: identity, "no identity now")
    renewed = Renewed(source, lambda identity: identity, "no identity now")
    renewed._source = Away()
    with pytest.raises(Unavailable) as caught:
        renewed.current()
    assert caught.value.public == "no identity now"
    assert caught.value.reason == "no identity: the agent is away"


def test_a_context_shows_the_svid(source):
    identity = source.current()
    for method in (SSL.TLS_SERVER_METHOD, SSL.TLS_CLIENT_METHOD):
        context = context_of(identity, method)
        shown = SSL.Connection(context, None).get_certificate(as_cryptography=True)
        assert shown.public_bytes(Encoding.DER) == identity.svid.chain_der[0]
