import os
import threading
from dataclasses import replace

import pytest

from tests.unit.identity.test_attestation import (
    CLI,
    DIRECTORY,
    GATEWAY,
    REPLICA,
    myself,
    process_of,
)
from ztserve.errors import IdentityError
from ztserve.identity import Rules, SpiffeId
from ztserve.identity.agent.attestation import CannotTell, FalseClaim
from ztserve.identity.agent.registration import Grant, Registry

LOCAL = Rules(trust_domain="td.example", local_ids=(GATEWAY,), default_id=CLI)
WORKERS = Rules(
    trust_domain="td.example",
    worker_parent=os.getpid(),
    worker_namespaces=("ml-inference",),
    worker_ids=(DIRECTORY,),
    local_ids=(GATEWAY,),
    default_id=CLI,
)


def ids(registry, process):
    return [str(grant.spiffe_id) for grant in registry.grants(process)]


class Entries:
    """What entries would say: all of `granted`, to everybody."""

    def __init__(self, *granted):
        self.granted = granted

    def grants(self, process, only=None):
        return tuple(g for g in self.granted if only in (None, g.spiffe_id))


def grant(text, **terms):
    return Grant(SpiffeId(text), **terms)


def test_a_process_of_another_uid_gets_nothing():
    registry = Registry(LOCAL)
    other = replace(myself(), uid=os.geteuid() + 1)
    for refused in (
        lambda: registry.register(other, CLI),
        lambda: registry.grants(other),
    ):
        with pytest.raises(IdentityError, match="only uid"):
            refused()
    assert not registry.living()


def test_claims_of_processes_that_ended_are_forgotten(child):
    registry = Registry(LOCAL)
    registry.grants(process_of(child.pid))
    assert [process.pid for process in registry.living()] == [child.pid]
    child.stdin.close()
    child.wait()
    assert not registry.living()


def test_a_reused_pid_is_another_process():
    registry = Registry(LOCAL)
    me = myself()
    registry.register(me, GATEWAY)
    assert ids(registry, me) == [GATEWAY]
    earlier = replace(me, started=me.started - 1)
    for refused in (
        lambda: registry.grants(earlier),
        lambda: registry.register(earlier, GATEWAY),
    ):
        with pytest.raises(IdentityError, match="has ended; its pid is another's"):
            refused()


def test_a_connection_that_outlives_its_process_gets_nothing(child):
    registry = Registry(LOCAL)
    process = process_of(child.pid)
    registry.register(process, GATEWAY)
    assert ids(registry, process) == [GATEWAY]
    child.stdin.close()
    child.wait()
    with pytest.raises(IdentityError, match="is gone"):
        registry.grants(process)


def test_a_process_registers_once_in_its_life():
    registry = Registry(LOCAL)
    me = myself()
    registry.register(me, GATEWAY)
    for second in (GATEWAY, CLI):
        with pytest.raises(FalseClaim, match=f"is {GATEWAY} already and cannot become"):
            registry.register(me, second)
    registry.forget(me)
    assert ids(registry, me) == [CLI]
    with pytest.raises(FalseClaim, match=f"is {CLI} already"):
        registry.register(me, GATEWAY)


def test_of_claims_at_once_one_is_believed():
    registry = Registry(LOCAL, check=lambda _process, _id: None)
    me, start, said = myself(), threading.Barrier(8), []

    def claim(text):
        start.wait()
        try:
            said.append(registry.register(me, text))
        except FalseClaim as error:
            said.append(error)

    threads = [
        threading.Thread(target=claim, args=((GATEWAY, CLI)[n % 2],)) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (one for one in said if isinstance(one, str))
    assert ids(registry, me) == [winner]


def test_a_worker_is_checked_before_it_is_believed(child):
    asked = []

    def check(process, spiffe_id):
        asked.append((process.pid, spiffe_id))
        raise FalseClaim("runs no actor")

    registry = Registry(WORKERS, check=check)
    with pytest.raises(FalseClaim, match="runs no actor"):
        registry.register(process_of(child.pid), REPLICA)
    assert asked == [(child.pid, REPLICA)]
    with pytest.raises(IdentityError, match="has registered no identity"):
        registry.grants(process_of(child.pid))
    registry.register(myself(), GATEWAY)  # no worker: nobody is asked
    assert len(asked) == 1


def test_a_worker_that_dies_while_it_is_checked_gets_nothing(child):
    process = process_of(child.pid)

    def check(_process, _spiffe_id):
        child.stdin.close()
        child.wait()

    with pytest.raises(IdentityError, match="is gone"):
        Registry(WORKERS, check=check).register(process, REPLICA)


@pytest.mark.parametrize("wanted", [GATEWAY, CLI])
def test_what_a_worker_never_gets_no_entry_gives_it(child, wanted):
    registry = Registry(WORKERS, entries=Entries(grant(wanted), grant(REPLICA)))
    worker = process_of(child.pid)
    with pytest.raises(FalseClaim, match="a Ray worker, and none such may be"):
        registry.register(worker, wanted)
    registry.register(worker, REPLICA)
    assert ids(registry, worker) == [REPLICA]
    assert ids(registry, myself()) == [wanted, REPLICA]


def test_a_worker_that_registered_nothing_has_nothing_whatever_entries_say(child):
    asked = []
    registry = Registry(
        WORKERS,
        entries=Entries(grant(REPLICA), grant(DIRECTORY)),
        check=lambda _process, spiffe_id: asked.append(spiffe_id),
    )
    worker = process_of(child.pid)
    with pytest.raises(IdentityError, match="has registered no identity"):
        registry.grants(worker)
    assert registry.register(worker, REPLICA) == REPLICA
    assert ids(registry, worker) == asked == [REPLICA]


def test_a_worker_is_never_an_admin(child):
    registry = Registry(
        WORKERS, entries=Entries(grant(REPLICA, admin=True), grant(DIRECTORY))
    )
    worker = process_of(child.pid)
    with pytest.raises(IdentityError, match=f"no registration entry makes .*{REPLICA}"):
        registry.register(worker, REPLICA)
    with pytest.raises(FalseClaim, match="is a Ray worker: it may not"):
        registry.check_admin(worker)
    assert registry.check_admin(myself()) == REPLICA
    by_id = Registry(WORKERS, entries=Entries(grant(REPLICA)), admin_ids=(REPLICA,))
    assert by_id.check_admin(myself()) == REPLICA
    with pytest.raises(IdentityError, match="no registration entry makes process"):
        by_id.register(worker, REPLICA)


def test_with_entries_a_process_is_all_that_applies_or_what_it_registered():
    entries = Entries(grant(GATEWAY), grant(CLI))
    registry = Registry(Rules(trust_domain="td.example"), entries=entries)
    me = myself()
    assert ids(registry, me) == [GATEWAY, CLI]
    with pytest.raises(IdentityError, match="no registration entry makes process"):
        registry.register(me, REPLICA)
    registry.register(me, CLI)
    assert ids(registry, me) == [CLI]
    entries.granted = (grant(GATEWAY),)
    with pytest.raises(IdentityError, match=f"applies to process {me.pid} as {CLI}"):
        registry.grants(me)
    entries.granted = (grant(CLI),)
    assert ids(registry, me) == [CLI]


def test_an_id_that_is_no_workload_s_names_no_admin():
    with pytest.raises(IdentityError, match="names a trust domain"):
        Registry(LOCAL, admin_ids=("spiffe://td.example",))


def test_what_cannot_be_found_out_now_is_no_false_claim(child):
    def check(_process, _spiffe_id):
        raise CannotTell("Ray does not answer")

    registry = Registry(WORKERS, check=check)
    with pytest.raises(CannotTell):
        registry.register(process_of(child.pid), REPLICA)
    assert not registry.living()
