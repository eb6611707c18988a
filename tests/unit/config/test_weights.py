"""The weights broker and its borrowers, as ztserve.toml has them made."""

import json
import threading

import pytest

from tests.unit.artifacts.brokers import BROKER_ID, DOMAIN, REPLICA_ID
from tests.unit.artifacts.workshop import Workshop
from ztserve import audit, config
from ztserve.artifacts import verify_model
from ztserve.errors import VerificationError
from ztserve.identity.quarantine.file import add
from ztserve.testing import ThrowAwayAuthority


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


@pytest.fixture
def settings(workshop, tmp_path):
    file = tmp_path / config.FILE
    text = f"[artifacts]\nregistry = {json.dumps(str(workshop.registry))}\n"
    file.write_text(text + f"trust_policy = {json.dumps(str(workshop.policy_path))}\n")
    file.chmod(0o600)
    return config.load(file)


@pytest.fixture
def authority():
    return ThrowAwayAuthority(DOMAIN)


@pytest.fixture
def quarantine(settings):
    with config.open_quarantine(settings) as made:
        yield made


def log_of(settings, authority, service, spiffe_id):
    return config.open_log(settings, service, "1", authority.source(spiffe_id))


@pytest.fixture
def broker(settings, authority, quarantine):
    log = log_of(settings, authority, "weights", BROKER_ID)
    source = authority.source(BROKER_ID)
    made = config.weights_broker(settings, source, log, quarantine)
    made.start()
    yield made
    made.stop()
    log.close()


@pytest.fixture
def memory(settings, authority, quarantine):
    log = log_of(settings, authority, "digits", REPLICA_ID)
    source = authority.source(REPLICA_ID)
    made = config.shared_memory(settings, source, log, quarantine, lambda: None)
    made._min_bytes = 0
    yield made
    log.close()


def records(settings, service):
    (path,) = settings.audit.directory.glob(f"{service}-*.jsonl")
    return list(audit.read(path))


def events(settings, service):
    return [r.get("activity_name") for r in records(settings, service)]


def test_the_brokers_name_is_of_the_trust_domain(settings):
    assert settings.broker_id == BROKER_ID


@pytest.mark.slow
def test_both_ends_meet_and_both_write_it_down(workshop, settings, broker, memory):
    workshop.published()
    model = verify_model(workshop.registry, "digits", workshop.trust, memory=memory)
    assert broker.holders == {model.digest: 1}
    assert "weights-borrowed" in events(settings, "digits")
    assert "weights-read" in events(settings, "weights")


@pytest.mark.slow
def test_the_broker_judges_by_the_policy_as_it_is_now(
    workshop, settings, broker, memory
):
    digest = workshop.published().digest
    before = workshop.trust
    workshop.write_policy(tail=f'[revoked]\nmanifests = ["{digest}"]\n')
    assert verify_model(workshop.registry, "digits", before, memory=memory)
    assert broker.holders == {}
    assert "weights-not-shared" in events(settings, "digits")
    assert "weights-refused" in events(settings, "weights")
    with pytest.raises(VerificationError, match="revokes the model"):
        verify_model(workshop.registry, "digits", workshop.trust, memory=memory)


@pytest.mark.slow
def test_a_broker_in_quarantine_lends_nothing(
    workshop, settings, broker, memory, quarantine
):
    workshop.published()
    changed = threading.Event()
    quarantine.subscribe(changed.set)
    quarantine.path.parent.mkdir(exist_ok=True)
    add(quarantine.path, BROKER_ID, reason="taken over", by="me", on_event=print)
    assert changed.wait(5)
    assert verify_model(workshop.registry, "digits", workshop.trust, memory=memory)
    kind = "weights-not-shared"
    found = records(settings, "digits")
    (record,) = [one for one in found if one.get("activity_name") == kind]
    assert "taken over" in record["unmapped"]["reason"]
