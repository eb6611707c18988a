"""Two replicas of one node over one copy of their weights."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.numpy import save_file

from examples.training.release import released
from tests.ray.test_scaling import OPTIONS, calling, eventually, records, serving
from ztserve import config, identity

MIB = 64


def heavy(folder):
    save_file({"w": np.ones(MIB << 18, np.float32)}, folder / "model.safetensors")
    return {}


@pytest.fixture(scope="module")
def shared(models, digits):
    released(digits, "heavy", "1", heavy)
    with serving(models.Heavy.options(num_replicas=2, **OPTIONS).bind(), "heavy"):
        yield digits


def told(settings, service, kind):
    return [
        record["unmapped"]
        for record in records(settings, service)
        if record.get("activity_name") == kind
    ]


def asked(client, value):
    answer = client.infer({"value": np.array([value], np.float32)})
    return int(answer["pid"][0]), float(answer["before"][0])


def test_replicas_of_a_node_map_one_copy_that_was_read_once(shared):
    borrowed = eventually(
        lambda: (found := told(shared, "heavy", "weights-borrowed"))[1:] and found
    )
    assert [event["memory"] for event in borrowed] == [borrowed[0]["memory"]] * 2
    (read,) = told(shared, "weights", "weights-read")
    assert read["bytes"] == borrowed[0]["bytes"]
    assert told(shared, "heavy", "weights-not-shared") == []
    handed = eventually(
        lambda: (found := told(shared, "weights", "weights-shared"))[1:] and found
    )
    pids = {event["process"] for event in handed}
    assert len(pids) == 2
    for pid in pids:  # as root sees it: replicas and broker are not dumpable
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        found = [line.split()[4] for line in maps if "ztserve-weights" in line]
        assert found == [str(borrowed[0]["memory"])]


def test_what_one_replica_writes_the_other_does_not_see(shared, developer):
    with calling(shared, developer, "heavy") as client:
        seen = {}
        until = time.monotonic() + 30
        while len(seen) < 2 and time.monotonic() < until:
            pid, before = asked(client, 7.0)
            seen.setdefault(pid, before)  # what it was before its own first write
    assert list(seen.values()) == [1.0, 1.0]


def test_digits_are_too_small_to_share(shared):
    assert told(shared, "inference-service", "weights-borrowed") == []
    assert told(shared, "inference-service", "weights-not-shared") == []


def test_a_worker_cannot_take_the_brokers_identity(shared):
    admin_socket = str(identity.admin_path(config.agent_directory(shared)))
    wanted = str(shared.broker_id)

    class Thief:
        def claim(self):
            from ztserve.errors import ZTServeError
            from ztserve.identity import register

            try:
                register(admin_socket, wanted, timeout_s=5)
            except ZTServeError as error:
                return str(error)
            return "registered"

    thief = ray.remote(num_cpus=0.1)(Thief).remote()
    said = ray.get(thief.claim.remote(), timeout=60)
    ray.kill(thief)
    assert f"none such may be {wanted}" in said


def test_a_broker_that_is_killed_costs_no_call_and_comes_back(
    shared, developer, models
):
    logs = shared.audit.directory.glob("weights-*.jsonl")
    (pid,) = [int(path.stem.removeprefix("weights-")) for path in logs]
    os.kill(pid, signal.SIGKILL)
    with calling(shared, developer, "heavy") as client:
        assert asked(client, 7.0)
    more = models.Heavy.options(num_replicas=2, **OPTIONS).bind()
    with serving(more, "again"):
        borrowed = eventually(
            lambda: (found := told(shared, "heavy", "weights-borrowed"))[3:] and found
        )
    by_memory = Counter(event["memory"] for event in borrowed)
    assert list(by_memory.values()) == [2, 2]
    assert len(told(shared, "weights", "weights-read")) == 2
