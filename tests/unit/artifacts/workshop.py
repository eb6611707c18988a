"""A bench for tests of artifacts: signers, a trust policy, small signed models."""

import json
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import save_file

from ztserve.artifacts import TrustPolicy
from ztserve.artifacts.publish import (
    SigningKey,
    attest_model,
    model_statement,
    publish,
    release_model,
    release_statement,
    result_predicate,
    sign_model,
)
from ztserve.artifacts.statements.attestation import TEST_RESULT, Metric
from ztserve.artifacts.statements.envelope import parse_envelope
from ztserve.artifacts.statements.keys import public_pem

ROLES = ("trainer", "evaluator", "deployer")


def signing_key(curve=ec.SECP256R1):
    return SigningKey(ec.generate_private_key(curve()))


def pem(key):
    return public_pem(key.public).decode()


class Workshop:
    """One key a role and a stranger's; everything lies under `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = {role: signing_key() for role in ROLES}
        self.stranger = signing_key()
        self.registry = path / "registry"
        self.policy_path = path / "trust.toml"
        self.write_policy()

    def write_policy(self, roles=None, head="version = 1", tail="") -> TrustPolicy:
        """Write and load a policy that gives each key its role, or those in `roles`."""
        keys = {**self.keys, "stranger": self.stranger}
        roles = roles or {role: [role] for role in ROLES}
        text = (
            head
            + "\n"
            + "".join(
                f'[[signers]]\nname = "{name}"\nkey = """{pem(keys[name])}"""\n'
                f"roles = {json.dumps(given)}\n"
                for name, given in roles.items()
            )
        )
        self.policy_path.write_text(text + tail)
        self.policy_path.chmod(0o644)
        return TrustPolicy.load(self.policy_path)

    @property
    def trust(self) -> TrustPolicy:
        return TrustPolicy.load(self.policy_path)

    def model(self, folder="digits", fill=1.0, files=None) -> Path:
        """Make an unsigned model: weights of one value, and a config."""
        root = self.path / folder
        root.mkdir()
        weights = {
            "layer.weight": np.full((4, 4), fill, np.float32),
            "layer.bias": np.full(4, fill, np.float32),
        }
        save_file(weights, root / "model.safetensors")
        for name, content in {"config.json": b"{}", **(files or {})}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return root

    def signed(self, folder="digits", name="digits", version="1", **model) -> Path:
        """Make a model that is signed, and released as ``name:version``."""
        root = self.model(folder, **model)
        sign_model(root, self.keys["trainer"])
        release_model(root, self.keys["deployer"], name=name, version=version)
        return root

    def published(self, folder="digits", name="digits", version="1", **model):
        """Make a model and publish it; return what it resolved to."""
        root = self.signed(folder, name, version, **model)
        return publish(root, self.registry, name=name, version=version)

    def evaluate(self, root, *, key=None, name="evaluation", result=None, **metrics):
        """Attest a signed model: PASSED with these metrics, or the `result`."""
        measured = {metric: Metric(value) for metric, value in metrics.items()}
        return attest_model(
            root,
            key or self.keys["evaluator"],
            name=name,
            predicate_type=TEST_RESULT,
            predicate=result_predicate(measured, result=result),
        )

    def force_sign(self, root, files, *, key=None, statement=None) -> None:
        """Sign and release whatever it is, as an authentic but careless signer would.

        `files`: name to hex SHA-256; `statement` replaces the one made from them.
        """
        payload = statement or model_statement(root.name, files)
        bundle = (key or self.keys["trainer"]).envelope(payload)
        (root / "model.sig").write_bytes(bundle)
        digest = parse_envelope(bundle, what="model.sig").digest
        release = release_statement("digits", "1", digest)
        (root / "release.sig").write_bytes(self.keys["deployer"].envelope(release))
