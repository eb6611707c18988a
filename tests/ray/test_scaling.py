"""More replicas, full queues, and replicas that cannot start (yet)."""

import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ztserve import audit, config, transport
from ztserve.errors import Overloaded
from ztserve.serving import cluster
from ztserve.serving.cluster import DeployFailed, deploy, statuses

OPTIONS = {
    "ray_actor_options": {"num_cpus": 0.1},
    "graceful_shutdown_timeout_s": 2,
    "graceful_shutdown_wait_loop_s": 0.1,
}


def eventually(check, seconds=60.0):
    until = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < until, f"not true within {seconds} s"
        time.sleep(0.1)
    return value


def places(settings, service):
    return dict(cluster.replicas(settings)).get(f"ml-inference/{service}", ())


def records(settings, service):
    for path in settings.audit.directory.glob(f"{service}-*.jsonl"):
        yield from audit.read(path)


@contextmanager
def serving(app, name):
    from ray import serve

    deploy(app, name=name)
    try:
        yield
    finally:
        serve.delete(name)


@contextmanager
def calling(settings, developer, service):
    with transport.Client(
        f"ml-inference/{service}",
        source=developer,
        directory=f"{settings.directory.host}:{settings.directory.port}",
        directory_id=settings.directory_id,
    ) as client:
        yield client


class Callers:
    """Threads that each make one call and keep what came of it."""

    def __init__(self, call, count):
        self.answers, self.errors = [], []
        self.call = call
        self.threads = [threading.Thread(target=self.work) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def work(self):
        try:
            self.answers.append(self.call())
        except Exception as error:
            self.errors.append(error)

    def finish(self):
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads)


def test_replicas_follow_the_load_of_direct_calls(
    models, digits, developer, tmp_path, record_property
):
    gate = tmp_path / "gate"
    scaled = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "metrics_interval_s": 0.1,
        "look_back_period_s": 0.5,
        "upscale_delay_s": 0.2,
        "downscale_delay_s": 0.2,
    }
    app = models.Busy.options(autoscaling_config=scaled, **OPTIONS).bind()
    with serving(app, "busy"), calling(digits, developer, "busy") as client:
        eventually(lambda: len(places(digits, "busy")) == 1)
        callers = Callers(lambda: client.infer({"gate": str(gate)}, timeout_s=60), 8)
        began = time.monotonic()
        # Each replica runs one call at a time: all but one of these only wait.
        eventually(lambda: len(places(digits, "busy")) == 2)
        grown = time.monotonic() - began
        second = Callers(lambda: client.infer({"gate": str(gate)}, timeout_s=60), 8)
        time.sleep(1)
        gate.touch()
        callers.finish()
        second.finish()
        assert (callers.errors, second.errors) == ([], [])
        answered = {
            int(answer["pid"][0]) for answer in callers.answers + second.answers
        }
        assert len(answered) == 2, "the second replica took its share"
        began = time.monotonic()
        eventually(lambda: len(places(digits, "busy")) == 1)
        record_property("grown_s", grown)
        record_property("shrunk_s", time.monotonic() - began)


def test_a_full_queue_is_overloaded_and_loses_nothing(
    models, digits, developer, tmp_path
):
    gate = tmp_path / "gate"
    app = models.Gated.options(max_ongoing_requests=3, max_queued=2, **OPTIONS).bind()
    with serving(app, "gated"), calling(digits, developer, "gated") as client:
        callers = Callers(lambda: client.infer({"gate": str(gate)}, timeout_s=60), 12)
        eventually(lambda: len(callers.errors) == 7)
        time.sleep(0.5)
        assert callers.answers == []
        gate.touch()
        callers.finish()
        assert len(callers.answers) == 3 + 2
        assert len(callers.errors) == 7
        for error in callers.errors:
            assert isinstance(error, Overloaded), error
            assert error.public == "the model is busy; try again later"
        kept = [r for r in records(digits, "gated") if r.get("class_uid") == 6003]
        assert sum(r["status"] == "released" for r in kept) == 5
        overloaded = [r for r in kept if r["status_code"] == "Overloaded"]
        assert len(overloaded) >= 7, "attempts that the client repeated count as well"
        assert len(kept) == 5 + len(overloaded)
        # What was full is free again.
        assert client.infer({"gate": str(gate)})["pid"].shape == (1,)


def test_a_policy_that_is_not_understood_keeps_a_replica_from_starting(
    models, digits, project, record_property
):
    policy = project / "policies" / "unruly.yaml"
    policy.write_text(
        "apiVersion: security.istio.io/v1\n"
        "kind: AuthorizationPolicy\n"
        "metadata: {name: unruly, namespace: ml-inference}\n"
        "spec:\n"
        "  selector: {matchLabels: {app: unruly}}\n"
        "  rules:\n"
        "    - form: [{source: {principals: ['*']}}]\n"
    )
    policy.chmod(0o644)
    with naming(project, "unruly.yaml"):
        app = models.Unruly.options(**OPTIONS).bind()
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.update(s.replicas for s in statuses() if s.app == "unruly")
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        with pytest.raises(DeployFailed) as refused:
            deploy(app, name="unruly")
        took = time.monotonic() - began
        (status,) = [s for s in statuses() if s.app == "unruly"]
    finally:
        done.set()
        watcher.join(10)
        from ray import serve

        serve.delete("unruly")
    for said in (str(refused.value), status.why):
        assert said.startswith("ConfigError: ")
        assert "unruly.yaml" in said
        assert "unknown field (did you mean 'from'?)" in said
        assert "Traceback" not in said
    assert status.state in ("UNHEALTHY", "DEPLOY_FAILED")
    assert not [counts for counts in seen if "RUNNING" in counts], seen
    assert places(digits, "unruly") == ()
    record_property("refused_s", took)
    assert took < 30


@contextmanager
def naming(project, policy):
    """The project's configuration with one policy more."""
    toml = project / config.FILE
    before = toml.read_text()
    toml.write_text(
        before.replace(
            '"policies/developer.yaml"',
            f'"policies/developer.yaml", "policies/{policy}"',
        )
    )
    try:
        yield
    finally:
        toml.write_text(before)


def test_a_registry_that_is_away_is_waited_for(models, digits, developer):
    registry = Path(digits.artifacts.registry)
    aside = registry.with_name("aside")
    app = models.Patient.options(model="digits:1", **OPTIONS).bind()
    failures = []

    def start():
        try:
            deploy(app, name="patient")
        except Exception as error:
            failures.append(error)

    def waits():
        return any("registry-away" in json.dumps(r) for r in records(digits, "patient"))

    starting = threading.Thread(target=start)
    registry.rename(aside)
    try:
        starting.start()
        eventually(waits)
        time.sleep(2)
        assert [s.state for s in statuses() if s.app == "patient"] == ["UPDATING"]
        assert places(digits, "patient") == ()
    finally:
        aside.rename(registry)
    starting.join(60)
    try:
        assert not starting.is_alive()
        assert failures == []
        with calling(digits, developer, "patient") as client:
            pixels = np.zeros((1, 64), np.float32)
            answer = client.infer({"pixels": pixels})
        assert answer["probabilities"].shape == (1, 10)
    finally:
        from ray import serve

        serve.delete("patient")


def test_a_model_that_the_registry_does_not_have_is_waited_for_no_longer_than_said(
    models, digits, project
):
    toml = project / config.FILE
    before = toml.read_text()
    toml.write_text(before.replace("[artifacts]", "[artifacts]\nwait_s = 1.0", 1))
    try:
        app = models.Patient.options(model="digits:none", **OPTIONS).bind()
    finally:
        toml.write_text(before)
    began = time.monotonic()
    with pytest.raises(DeployFailed, match=r"^RegistryError: .*digits:none"):
        deploy(app, name="absent")
    took = time.monotonic() - began
    from ray import serve

    serve.delete("absent")
    assert took < 30
