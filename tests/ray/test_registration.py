"""Registrations, checked against the actor table of a living Ray."""

import ray

from ztserve import audit, config, identity


def agent_events(settings):
    for path in settings.audit.directory.glob("agent-*.jsonl"):
        for line in audit.read(path):
            yield line.get("activity_name"), line.get("unmapped", {})


def test_a_worker_that_is_no_replica_registers_no_replica_s_identity(digits):
    admin_socket = str(identity.admin_path(config.agent_directory(digits)))
    wanted = str(digits.spiffe_id("inference-service"))

    def claim():
        from ztserve.errors import ZTServeError
        from ztserve.identity import register

        try:
            register(admin_socket, wanted, timeout_s=5)
        except ZTServeError as error:
            return str(error)
        return "registered"

    class Thief:
        def claim(self):
            return claim()

    task = ray.remote(num_cpus=0.1)(claim)
    assert f"runs no actor, and claims {wanted}" in ray.get(task.remote(), timeout=60)
    thief = ray.remote(num_cpus=0.1)(Thief).remote()
    said = ray.get(thief.claim.remote(), timeout=60)
    ray.kill(thief)
    assert "runs the actor '(no name)'" in said
    assert f"none such may be {wanted}" in said
    alerts = [told for kind, told in agent_events(digits) if kind == "identity-alert"]
    assert len([told for told in alerts if wanted in told["reason"]]) >= 2


def test_each_replica_and_the_directory_were_registered_once(digits):
    registered = [
        (told["pid"], told["id"])
        for kind, told in agent_events(digits)
        if kind == "identity-registered"
    ]
    assert len({pid for pid, _ in registered}) == len(registered)
    ids = {spiffe_id for _, spiffe_id in registered}
    assert {digits.directory_id, digits.spiffe_id("inference-service")} <= ids
