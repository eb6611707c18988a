"""From `[identity] federation` to whom a replica believes, and whom policies name."""

import time

import pytest

from tests.unit.identity.federated import DOOR, THEIRS, Endpoint
from ztserve import config
from ztserve.errors import ConfigError
from ztserve.identity import Agent, Authority, Rules, WorkloadSource
from ztserve.testing import ThrowAwayAuthority
from ztserve.types import clock

OURS = "dev.ztserve.internal"
CLI = f"spiffe://{OURS}/ns/dev/sa/cli"
TABLE = """
[[federation]]
trust_domain = "{THEIRS}"
profile = "https_spiffe"
url = "{url}"
spiffe_id = "{DOOR}"
bootstrap = "theirs.json"
"""


def until(check):
    end = time.monotonic() + 20
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def settings(tmp_path):
    path = tmp_path / config.FILE
    path.write_text('[identity]\nfederation = "federation.toml"\n')
    return config.load(path)


@pytest.mark.slow
def test_a_federated_bundle_comes_from_the_file_to_a_workload_and_goes_with_it(
    settings, tmp_path
):
    theirs, told = ThrowAwayAuthority(THEIRS), []
    (tmp_path / "theirs.json").write_bytes(theirs.trust_bundle().jwks())
    file = settings.identity.federation
    with Endpoint(theirs) as endpoint:
        file.write_text(TABLE.format(THEIRS=THEIRS, DOOR=DOOR, url=endpoint.url))
        federation = config.follow_federation(
            settings, lambda kind, facts: told.append((kind, facts))
        )
        rules = Rules(trust_domain=OURS, default_id=CLI)
        folder = tmp_path / "agent"
        folder.mkdir(mode=0o700)
        with (
            Agent(Authority(OURS), folder, rules, federation=federation) as agent,
            WorkloadSource(agent.socket) as source,
        ):
            until(lambda: source.current().bundles.get(THEIRS) == theirs.bundle)
            file.write_text("federation = []\n")
            until(lambda: THEIRS not in source.current().bundles)
        federation.close()
    assert "relationships-loaded" in [kind for kind, _ in told]


def test_a_policy_that_would_let_in_all_federated_domains_is_refused(
    settings, tmp_path
):
    (tmp_path / "policy.yaml").write_text(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        "metadata: {name: p, namespace: ml-inference}\n"
        "spec: {rules: [{from: [{source: {namespaces: [x]}}]}]}\n"
    )
    settings.identity.federation.write_text(
        f'[[federation]]\ntrust_domain = "{THEIRS}"\n'
        'profile = "file"\nfile = "b.json"\n'
    )
    text = 'authorization = {policies = ["policy.yaml"]}\n'
    path = tmp_path / config.FILE
    asked = {"service": "s", "namespace": "ml-inference", "operations": None}
    path.write_text(text)
    config.load_policies(config.load(path), **asked)
    path.write_text(text + '[identity]\nfederation = "federation.toml"\n')
    with pytest.raises(ConfigError, match=f"{THEIRS}; add principals or trustDomains"):
        config.load_policies(config.load(path), **asked)


def test_nothing_is_followed_where_nothing_is_said(tmp_path):
    path = tmp_path / config.FILE
    path.write_text("")
    assert config.follow_federation(config.load(path), print) is None


@pytest.mark.slow
def test_a_step_of_the_clock_is_in_the_audit(settings, tmp_path, monkeypatch):
    wall = [1_000_000.0]
    stepping = clock.Clock(lambda: wall[0], lambda: 0.0)
    monkeypatch.setattr(config.rooms, "on_clock_step", stepping.on_step)
    source = ThrowAwayAuthority(OURS).source(CLI)
    log = config.open_log(settings, "test", "1", source)
    wall[0] -= 120
    stepping.now()
    file = settings.audit.directory / "test-1.jsonl"
    until(lambda: "clock-stepped" in file.read_text())
    assert '"seconds":-120' in file.read_text()
    log.close()
