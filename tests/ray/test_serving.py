import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ztserve import audit, config, transport
from ztserve.errors import CallError, Denied, InferenceError
from ztserve.serving import cluster
from ztserve.serving.cluster import DeployFailed, deploy, statuses

OPTIONS = {
    "ray_actor_options": {"num_cpus": 0.1},
    "graceful_shutdown_timeout_s": 5,
    "graceful_shutdown_wait_loop_s": 0.1,
}
PIXELS = np.full((1, 64), 3, np.float32)


def records(settings, service="inference-service"):
    for path in settings.audit.directory.glob(f"{service}-*.jsonl"):
        yield from audit.read(path)


class Load:
    """Steady calls from threads, until the block ends."""

    def __init__(self, client, threads=4):
        self.client, self.done = client, threading.Event()
        self.answered, self.failed = [], []
        self.threads = [threading.Thread(target=self.work) for _ in range(threads)]

    def work(self):
        while not self.done.is_set():
            try:
                self.client.infer({"pixels": PIXELS}, timeout_s=20)
                self.answered.append(time.monotonic())
            except CallError as error:
                self.failed.append(error)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        time.sleep(1)
        return self

    def __exit__(self, *_):
        time.sleep(1)
        self.done.set()
        for thread in self.threads:
            thread.join(30)


def eventually(check, seconds=20.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = check()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not true within {seconds} s")


def replicas(settings, key="ml-inference/inference-service"):
    places = dict(cluster.replicas(settings))
    return {endpoint.address: endpoint for endpoint in places.get(key, ())}


def test_a_verified_caller_is_answered_and_recorded(client, digits):
    answer = client.infer({"pixels": PIXELS})
    assert answer["probabilities"].shape == (1, 10)
    last = [r for r in records(digits) if r.get("class_uid") == 6003][-1]
    text = json.dumps(last)
    assert str(digits.developer_id) in text
    assert "sha256:" in text


def test_the_served_accuracy_is_the_trained_accuracy(client, project):
    from examples.training.digits import accuracy, held_back

    pixels, labels = held_back()
    scores = np.concatenate(
        [
            client.infer({"pixels": pixels[i : i + 32]})["probabilities"]
            for i in range(0, len(pixels), 32)
        ]
    )
    trained = json.loads(_config(project))["accuracy"]
    assert accuracy(scores, labels) == pytest.approx(trained, abs=1e-9)


def _config(project):
    from ztserve.artifacts import TrustPolicy, verify_model

    settings = config.load()
    trust = TrustPolicy.load(settings.artifacts.trust_policy)
    model = verify_model(settings.artifacts.registry, "digits:1", trust)
    return model.read("config.json")


def test_two_replicas_have_different_keys_and_serials(client, digits):
    assert eventually(lambda: len(replicas(digits)) == 2)
    origins = {
        json.dumps(r["unmapped"]["origin"], sort_keys=True)
        for path in digits.audit.directory.glob("inference-service-*.jsonl")
        for r in list(audit.read(path))[:1]
    }
    serials = {json.loads(o)["serial"] for o in origins}
    ids = {json.loads(o)["spiffe_id"] for o in origins}
    assert len(serials) == len(origins) >= 2
    assert ids == {str(digits.spiffe_id("inference-service"))}


def test_a_plain_ray_handle_call_is_refused_with_what_to_do_instead(digits):
    from ray import serve

    handle = serve.get_app_handle("digits")
    for method in ("predict", "load", "__call__", "check_health", "_replica"):
        with pytest.raises(Exception, match=r"answers only verified callers over mTLS"):
            handle.options(method_name=method).remote(PIXELS).result(timeout_s=20)


def test_an_update_to_a_tampered_model_leaves_the_old_version_answering(
    client, digits, project
):
    from examples.digits import Digits

    tampered_version(digits, "tampered")
    with Load(client) as load, pytest.raises(DeployFailed) as refused:
        deploy(
            Digits.options(num_replicas=2, model="digits:tampered", **OPTIONS).bind(),
            name="digits",
        )
    assert load.failed == []
    assert len(load.answered) > 50
    assert str(refused.value).startswith("VerificationError: ")
    assert "model.safetensors" in str(refused.value)
    why = [s.why for s in statuses() if s.app == "digits"]
    assert why[0].startswith("VerificationError: ")
    assert any("VerificationError" in json.dumps(r) for r in records(digits))


def tampered_version(settings, version):
    """Publish digits under another version, then flip a bit of it where it lies."""

    def other(folder):
        facts = train(folder, network=network)
        (folder / "note.json").write_text(json.dumps({"version": version}))
        tensors = load_file(folder / "model.safetensors")
        save_file({n: t + 1 for n, t in tensors.items()}, folder / "model.safetensors")
        return facts

    from examples.digits import network
    from examples.training.digits import train
    from examples.training.release import released

    blobs = settings.artifacts.registry / "blobs/sha256"
    before = set(blobs.iterdir())
    released(settings, "digits", version, other)
    new = max(set(blobs.iterdir()) - before, key=lambda path: path.stat().st_size)
    content = bytearray(new.read_bytes())
    content[-1] ^= 1
    new.chmod(0o600)
    new.write_bytes(content)


def test_a_rolling_update_to_a_good_version_fails_no_call(client, digits):
    from examples.digits import Digits

    before = set(replicas(digits))
    with Load(client) as load:
        deploy(
            Digits.options(num_replicas=2, model="digits:1", **OPTIONS).bind(),
            name="digits",
        )
        eventually(lambda: len(set(replicas(digits)) - before) == 2)
    assert load.failed == []
    assert len(load.answered) > 50


def test_kill_nine_loses_no_acknowledged_call_and_the_replica_is_replaced(
    client, digits
):
    eventually(lambda: len(replicas(digits)) == 2)
    acknowledged, failed, done = [], [], threading.Event()

    def work():
        while not done.is_set():
            try:
                acknowledged.append(client.infer({"pixels": PIXELS}, timeout_s=20))
            except CallError as error:
                failed.append(error)

    before_count = len([r for r in records(digits) if r.get("status") == "released"])
    threads = [threading.Thread(target=work) for _ in range(32)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    before = set(replicas(digits))
    pid = next(iter(_pids(digits)))
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: len(set(replicas(digits)) - before) == 1, 30)
    took = time.monotonic() - killed
    time.sleep(1)
    done.set()
    for thread in threads:
        thread.join(30)
    assert len(failed) <= 32, failed[:3]
    released = [r for r in records(digits) if r.get("status") == "released"]
    assert len(released) - before_count >= len(acknowledged) > 100
    print(
        f"replaced in {took:.1f} s; {len(failed)} of {len(acknowledged)} calls failed"
    )
    assert took < 30


def _pids(settings):
    """The replicas that answered of late, by their logs' names."""
    import ray

    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith("SERVE_REPLICA::digits#"):
            handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
            yield ray.get(handle.is_allocated.remote())[0]


def test_composition_is_denied_without_its_policy_and_allowed_with_it(
    digits, developer, project
):
    from ray import serve

    from examples.digits import Digits
    from examples.pipeline import Preprocess

    with transport.Client(
        "ml-inference/preprocess",
        source=developer,
        directory=f"{digits.directory.host}:{digits.directory.port}",
        directory_id=digits.directory_id,
    ) as client:
        image = np.full((1, 8, 8), 128, np.uint8)
        # What is left is the pipeline's own replicas, with their own policies.
        serve.delete("digits")
        inner = Digits.options(model="digits:1", **OPTIONS)
        deploy(Preprocess.options(**OPTIONS).bind(inner.bind()), name="pipeline")
        with pytest.raises((InferenceError, CallError)) as denied:
            client.infer({"image": image})
        assert not isinstance(denied.value, Denied)
        allow(project, "pipeline.yaml")
        deploy(Preprocess.options(**OPTIONS).bind(inner.bind()), name="pipeline")
        answer = client.infer({"image": image})
        assert answer["probabilities"].shape == (1, 10)


def allow(project, policy):
    from pathlib import Path

    import examples

    source = Path(examples.__file__).parent / "policies" / policy
    copy = project / "policies" / policy
    copy.write_bytes(source.read_bytes())
    copy.chmod(0o644)
    toml = project / config.FILE
    toml.write_text(
        toml.read_text().replace(
            '"policies/developer.yaml"',
            f'"policies/developer.yaml", "policies/{policy}"',
        )
    )
