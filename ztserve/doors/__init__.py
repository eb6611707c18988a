"""What may be reached through us alone? The registry door: models, read only.

`RegistryDoor` reads a registry for callers whom its policies let; `registry_methods`
are what a `transport.Server` answers for it, and none of them writes. `DoorRegistry` is
that registry as its callers see it: replicas need no path to the storage, and no
credentials for it. What a door answers is as untrusted as any registry.
"""

from ztserve.doors.address import SCHEME, DoorAddress
from ztserve.doors.reading import DoorRegistry
from ztserve.doors.registry import RegistryDoor, registry_methods
from ztserve.doors.wire import MAX_REQUEST_BYTES

__all__ = [
    "MAX_REQUEST_BYTES",
    "SCHEME",
    "DoorAddress",
    "DoorRegistry",
    "RegistryDoor",
    "registry_methods",
]
