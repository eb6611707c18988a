"""Policies for tests, built from the part that a test is about."""

from collections.abc import Callable
from textwrap import indent

import pytest

from ztserve.authorization import AccessRequest, PolicySet

LOCAL = "dev.ztserve.internal"
GATEWAY = f"spiffe://{LOCAL}/ns/ml-api/sa/api-gateway"


@pytest.fixture
def policy() -> Callable[..., str]:
    """An AuthorizationPolicy with the given rules (YAML) and header fields."""

    def build(rules="- {}", *, action="ALLOW", name="p", namespace="ml", **more) -> str:
        annotations = more.pop("annotations", "")
        selector = more.pop("selector", "")
        return "\n".join(
            [
                "apiVersion: security.istio.io/v1",
                "kind: AuthorizationPolicy",
                f"metadata: {{name: {name}, namespace: {namespace}{annotations}}}",
                "spec:",
                *([f"  selector: {selector}"] if selector else []),
                f"  action: {action}",
                "  rules:",
                indent(rules.strip("\n"), "  "),
                "---",
                "",
            ]
        )

    return build


@pytest.fixture
def parse() -> Callable[..., PolicySet]:
    """PolicySet.parse for app `model` in namespace `ml`."""

    def build(text, **options) -> PolicySet:
        options = {
            "trust_domain": LOCAL,
            "namespace": "ml",
            "labels": {"app": "model"},
            **options,
        }
        return PolicySet.parse(text, **options)

    return build


@pytest.fixture
def allows(parse, policy) -> Callable[..., bool]:
    """Whether one ALLOW policy with these rules lets a request pass."""

    def ask(rules, *, options=None, action="ALLOW", **request) -> bool:
        asked = {"principal": GATEWAY, "method": "POST", "path": "/v1/predict"}
        text = policy(rules, action=action)
        if action == "DENY":
            text += policy(name="everyone")
        policies = parse(text, **(options or {}))
        return policies.decide(AccessRequest(**{**asked, **request})).allowed

    return ask
