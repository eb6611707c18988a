"""The trust policy of this configuration: its root, and the floors under it."""

from pathlib import Path

from ztserve import artifacts
from ztserve.config.settings import Settings


def load_trust(settings: Settings, path: Path | None = None) -> artifacts.TrustPolicy:
    """Read the trust policy, or that at `path`, to judge with it now; ConfigError.

    The configured one must not be older than what this node has seen.
    """
    chosen = settings.artifacts
    policy = artifacts.TrustPolicy.load(
        path or chosen.trust_policy,
        root=chosen.trust_root,
        trust_domain=settings.identity.trust_domain,
    )
    if path is None:
        artifacts.check_anchored(policy)
        _floor(settings).check(policy)
    return policy


def follow_trust(settings: Settings) -> artifacts.FollowedPolicy:
    """Read the trust policy, remember it as seen, and follow it; ConfigError."""
    chosen = settings.artifacts
    followed = artifacts.FollowedPolicy(
        chosen.trust_policy,
        _floor(settings),
        root=chosen.trust_root,
        trust_domain=settings.identity.trust_domain,
    )
    artifacts.check_anchored(followed.policy)
    return followed


def _floor(settings: Settings) -> artifacts.Floor:
    least = settings.artifacts.min_policy_version
    return artifacts.Floor(settings.state, least=least)
