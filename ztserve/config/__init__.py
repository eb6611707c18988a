"""What are we told? ztserve.toml and the environment, and rooms built of them."""

from ztserve.config.environment import (
    before_ray,
    default_environment,
    endpoint_socket,
    process_environment,
    ray_auth_mode,
)
from ztserve.config.file import found_file, load
from ztserve.config.registry import door_listener, open_registry, registry_door
from ztserve.config.rooms import (
    agent_directory,
    check_identity_files,
    follow_federation,
    follow_trust,
    has_agent,
    limits,
    load_policies,
    load_trust,
    obtain_identity,
    open_log,
    open_quarantine,
    open_tokens,
    record_refusal,
)
from ztserve.config.settings import DEVELOPMENT_DOMAIN, FILE, Settings, entries
from ztserve.config.weights import shared_memory, weights_broker

__all__ = [
    "DEVELOPMENT_DOMAIN",
    "FILE",
    "Settings",
    "agent_directory",
    "before_ray",
    "check_identity_files",
    "default_environment",
    "door_listener",
    "endpoint_socket",
    "entries",
    "follow_federation",
    "follow_trust",
    "found_file",
    "has_agent",
    "limits",
    "load",
    "load_policies",
    "load_trust",
    "obtain_identity",
    "open_log",
    "open_quarantine",
    "open_registry",
    "open_tokens",
    "process_environment",
    "ray_auth_mode",
    "record_refusal",
    "registry_door",
    "shared_memory",
    "weights_broker",
]
