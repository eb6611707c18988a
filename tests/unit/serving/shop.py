"""A project of profile production whose bundle is signed, and replicas of it. No Ray.

Everything is real: the command line signs, the replica verifies, loads and answers. Of
sys.path only the project and a small folder of packages are measured, to save time.
"""

import json
import os
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
from cryptography.hazmat.primitives import serialization

from tests.unit.artifacts.workshop import Workshop, pem, signing_key
from ztserve import artifacts, config, transport
from ztserve.artifacts import TrustPolicy, publish
from ztserve.artifacts.deployment import importing
from ztserve.cli import main
from ztserve.cli import run as running
from ztserve.serving import Replica
from ztserve.serving.parts import arguments_of
from ztserve.testing import ThrowAwayAuthority

DOMAIN = "shop.example"
APP = "shopping:app"
MODULE = """\
from ztserve import ModelRef, TensorSpec, ZTDeployment

class Price(ZTDeployment):
    model = ModelRef("digits@production")
    inputs = (TensorSpec("x", "FP32", (-1, 1)),)
    outputs = (TensorSpec("y", "FP32", (-1, 1)),)

    def __init__(self, factor=2.0):
        self.factor = factor

    def load(self, model):
        self.weight = dict(model.tensors())["layer.bias"][0].item()

    def predict(self, x):
        return x * self.weight * self.factor

app = Price.bind(factor=2.0)
"""
PAIR = """\
from ztserve import ModelRef, TensorSpec, ZTDeployment

class Pair(ZTDeployment):
    model = {"large": ModelRef("digits:1"), "small": ModelRef("other:1")}
    inputs = (TensorSpec("x", "FP32", (-1, 1)),)
    outputs = (TensorSpec("y", "FP32", (-1, 1)),)

    def load(self, models):
        self.models = {part: dict(m.tensors()) for part, m in models.items()}

    def predict(self, x):
        return x * self.models["large"]["layer.bias"][0].item()

app = Pair.bind()
"""
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: callers, namespace: ml-inference}}
spec:
  rules:
    - from: [{{source: {{principals: ["cluster.local/ns/dev/sa/{caller}"]}}}}]
"""
CONFIG = """\
profile = "production"
[identity]
trust_domain = "shop.example"
wait_s = 1
svid_files = ["svid.pem", "key.pem", "bundle.pem"]
[artifacts]
registry = "../work/registry"
trust_policy = "../work/trust.toml"
trust_root = "root.pub"
wait_s = 1
[authorization]
policies = ["policies/callers.yaml"]
[gateway]
deployments = ["price"]
"""


class Shop:
    """The project lies in `folder`, its packages in `packages`."""

    def __init__(self, path, monkeypatch) -> None:
        with warnings.catch_warnings(action="ignore"):
            import ray.serve  # noqa: F401 - what it warns of is not ours to mend
        self.folder, self.packages = path / "project", path / "packages"
        for made in (self.folder, self.packages, path / "work"):
            made.mkdir()
        self.workshop = Workshop(path / "work")
        self.root = signing_key()
        self.authority = ThrowAwayAuthority(DOMAIN)
        self.write("root.pub", pem(self.root))
        self.write("ztserve.toml", CONFIG)
        self.write("policies/callers.yaml", POLICY.format(caller="cli"))
        self.write("shopping.py", MODULE)
        (self.packages / "dependency.py").write_text("FACTOR = 1\n")
        self.write_policy()
        self.workshop.published()
        publish.set_alias(
            self.workshop.registry, name="digits", alias="production", version="1"
        )
        (path / "deployer.pem").write_bytes(private(self.workshop.keys["deployer"]))
        (path / "deployer.pem").chmod(0o600)
        self.key = path / "deployer.pem"
        monkeypatch.chdir(self.folder)
        monkeypatch.setenv("ZTSERVE_CONFIG", str(self.folder / config.FILE))
        monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
        monkeypatch.setattr(sys, "path", [str(self.folder), *sys.path])
        small = partial(
            artifacts.measure_packages, path=[str(self.folder), str(self.packages)]
        )
        monkeypatch.setattr(artifacts, "measure_packages", small)

    def write(self, name, text):
        """Write a file of the project."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        before = path.stat().st_mtime if path.exists() else 0.0
        path.write_text(text)
        # Python takes a compiled module for one of the same second and size.
        os.utime(path, (before + 2, before + 2) if before else None)
        path.chmod(0o644)
        return path

    def write_policy(self, root=None, head="version = 1", **more) -> TrustPolicy:
        """Write a trust policy, signed under the root, or under another."""
        head += f'\ntrust_domain = "{DOMAIN}"'
        self.workshop.write_policy(head=head, **more)
        publish.sign_policy(self.workshop.policy_path, root or self.root)
        return self.workshop.trust

    @property
    def bundle(self):
        return self.folder / ".ztserve/deployment.sig"

    def sign(self, app=APP, *words) -> bytes:
        """Sign with the command line; return the bundle."""
        self.forget()
        code = main(["bundle", "sign", app, "--key", str(self.key), *words])
        assert code == 0
        return self.bundle.read_bytes()

    def plan(self, app=APP, **changes):
        """Return what Ray would carry to a replica: plan, and how it was signed."""
        from ztserve.serving.binding import bound

        self.forget()
        plan, _, args, kwargs = next(bound(running.load(app)))
        self.forget()
        settings = changes.pop("settings", {})
        for table, values in settings.items():
            old = getattr(plan.settings, table)
            new = replace(old, **values) if isinstance(values, dict) else values
            plan = replace(plan, settings=replace(plan.settings, **{table: new}))
        return replace(plan, **changes), args, kwargs

    def make(self, app=APP, *, planned=None, cls=None, name="r1", **changes):
        """Make a replica as Serve's shell does, and do not start it yet."""
        plan, args, kwargs = planned or self.plan(app, **changes)
        source = self.authority.source(plan.settings.spiffe_id(plan.service))
        made = Replica(
            cls, plan, source, name=name, arguments=lambda: arguments_of(args, kwargs)
        )
        return made, args, kwargs

    @contextmanager
    def replica(self, app=APP, **changes):
        """Run a replica."""
        made, args, kwargs = self.make(app, **changes)
        try:
            made.start(args, kwargs)
            yield made
        finally:
            made.stop(0.5)

    def call(self, replica, value=1.0, caller="cli"):
        """Call it, as ns/dev/sa/cli."""
        settings = replica.plan.settings
        with transport.Client(
            replica.address,
            source=self.authority.source(settings.spiffe_id(caller, "dev")),
            server_id=settings.spiffe_id(replica.deployment.service),
            model=replica.model_name,
        ) as client:
            return float(client.infer({"x": [[value]]})["y"][0][0])

    def records(self):
        """Return all that was audited."""
        return [
            json.loads(line)
            for path in sorted((self.folder / ".ztserve/audit").glob("*.jsonl"))
            for line in path.read_text().splitlines()
        ]

    def forget(self) -> None:
        """Have the project's modules imported anew, and unguarded, as elsewhere."""
        importing.release(self.folder)


def private(key) -> bytes:
    """Return a signing key as PEM."""
    return key._key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A signed shop."""
    made = Shop(tmp_path, monkeypatch)
    made.sign()
    yield made
    made.forget()
