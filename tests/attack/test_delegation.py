"""A SPIRE that lies, and a process that keeps the agent's admin socket busy."""

import os
import threading
import time

import pytest

from tests.unit.identity.test_agent import fetch
from tests.unit.identity.test_delegation import (
    ME,
    UID,
    another_authority,
    delegating,
    edited,
)
from ztserve.errors import IdentityError
from ztserve.identity import Agent, Rules, admin
from ztserve.identity.agent import front, subscription
from ztserve.identity.spiffe_id import workload_id
from ztserve.identity.svid import Svid
from ztserve.testing import SimulatedSpire, ThrowAwayAuthority

pytestmark = pytest.mark.slow


def believed(sent, _bundle, *, now):
    """What `read_svid` would be without its judgement."""
    name = workload_id(f"spiffe://{sent.svid.id.trust_domain}{sent.svid.id.path}")
    from cryptography.hazmat.primitives.serialization import load_der_private_key

    key = load_der_private_key(sent.key, None)
    return Svid(
        name, tuple(sent.svid.certificates), key, 1, now, now.replace(year=2100)
    )


@pytest.mark.parametrize("control", [True, False])
def test_an_svid_of_another_authority_is_not_handed_on(tmp_path, monkeypatch, control):
    tmp_path.chmod(0o700)
    if not control:
        monkeypatch.setattr(subscription, "read_svid", believed)
    authority = ThrowAwayAuthority("td.example")
    with SimulatedSpire(tmp_path / "s.sock", authority) as upstream:
        upstream.add(ME, UID)
        upstream.lie = edited(another_authority)
        with delegating(upstream, tmp_path) as agent:
            if control:
                with pytest.raises(Exception, match="no registration entry applies"):
                    fetch(agent.socket)
            else:
                assert fetch(agent.socket).svids[0].spiffe_id == ME


@pytest.mark.parametrize("control", [True, False])
def test_one_process_keeps_no_admin_from_being_heard(tmp_path, monkeypatch, control):
    """It asks for much that takes long; an honest admin wants to shut somebody out."""
    tmp_path.chmod(0o700)
    if not control:
        monkeypatch.setattr(front, "_OF_ONE", 1000)
    released, refused = threading.Event(), []

    def slow(_process, _request):
        released.wait(5)
        return {}

    rules = Rules(trust_domain="td.example", default_id=ME)
    with Agent(
        ThrowAwayAuthority("td.example"),
        tmp_path,
        rules,
        admin_ids=(ME,),
        extra_ops={"slow": slow},
    ) as agent:

        def flood():
            try:
                admin(agent.admin_socket, {"op": "slow"}, timeout_s=10)
            except IdentityError as error:
                refused.append(str(error))

        floods = [threading.Thread(target=flood) for _ in range(10)]
        for one in floods:
            one.start()
        time.sleep(0.5)
        waiting = agent._front._others._work_queue.qsize()
        released.set()
        for one in floods:
            one.join()
    if control:
        assert waiting == 0  # a thread is free for the next process
        expected = f"process {os.getpid()} has 2 requests in work: wait for them"
        assert len(refused) == 8
        assert all(expected in one for one in refused)
    else:
        assert waiting > 0
        assert refused == []
