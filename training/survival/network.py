"""Whether nodes of a run can connect to each other, over plain TCP."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

SIOCGIFADDR = 0x8915
CONNECT_SECONDS = 3.0
AT_ONCE = 64


def own_address(environment: Mapping[str, str] = os.environ) -> str:
    """The address under which the other ranks reach this node.

    That of the interface that gloo or NCCL is told to use, else the one that leads to MASTER_ADDR.

    Raises:
        OSError: there is no such interface, or no way to the master.
    """
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        interface = environment.get(name, "").split(",")[0].lstrip("=")
        if interface and not interface.startswith("^"):
            found = _address_of(interface)
            if found is not None:
                return found
    master = environment.get("MASTER_ADDR", "localhost")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))  # sends nothing: only asks the routing table
        return str(probe.getsockname()[0])


def _address_of(interface: str) -> str | None:
    """NCCL takes prefixes of names (ib for ib0): the first that has an address."""
    for _, name in socket.if_nameindex():
        if not name.startswith(interface):
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            try:
                answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no address
            return socket.inet_ntoa(answer[20:24])
    return None


def open_port() -> int:
    """A port of this process, open until it ends; the kernel completes connections to it also where the process stands
    still. A thread takes them up, or the kernel's queue would be full one day, and the node pass for cut off."""
    server = socket.create_server(("", 0), backlog=512)
    threading.Thread(target=_take_up, args=(server,), name="reachable", daemon=True).start()
    return int(server.getsockname()[1])


def _take_up(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except OSError:  # no file descriptor is free, or the other end was faster
            time.sleep(1.0)


def unreachable(places: Mapping[str, tuple[str, int]], seconds: float = CONNECT_SECONDS) -> list[str]:
    """Names of `places` (name: address, port) that cannot be connected to."""
    names = list(places)
    with ThreadPoolExecutor(max_workers=min(AT_ONCE, len(names)) or 1) as pool:
        answers: Iterable[bool] = pool.map(lambda name: _connects(*places[name], seconds), names)
        return [name for name, answered in zip(names, answers, strict=True) if not answered]


def _connects(address: str, port: int, seconds: float) -> bool:
    try:
        with socket.create_connection((address, port), timeout=seconds):
            return True
    except OSError:
        return False
