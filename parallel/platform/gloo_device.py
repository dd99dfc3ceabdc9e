"""One network thread for all of a rank's gloo groups.

torch gives every gloo group a device of its own, whose thread wakes a hundred times a second. Core makes some thirty
groups a rank: on a machine with few cores their wake-ups alone cost a large part of the time. gloo lets groups share a
device; the wake-ups fall with their number.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import ProcessGroupGloo


class OneDeviceGloo(ProcessGroupGloo):
    """ProcessGroupGloo over the devices that all groups of this process share."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options: Any = vars(ProcessGroupGloo)["_Options"]()
        options._devices = _devices(os.environ.get("GLOO_SOCKET_IFNAME", ""))
        options._timeout = timeout
        super().__init__(store, rank, size, options)


@cache
def _devices(interfaces: str) -> list[Any]:
    """As torch chooses them: the interfaces of GLOO_SOCKET_IFNAME, else the one of this host's name."""
    if interfaces:
        return [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]
    return [ProcessGroupGloo.create_default_device()]


def share_gloo_device() -> None:
    """Make every gloo group from now on an OneDeviceGloo."""
    namespace: Any = distributed_c10d
    namespace.ProcessGroupGloo = OneDeviceGloo
