"""The cables between machines: one switch inside the controller's namespace, and no way out of it."""

from __future__ import annotations

from dataclasses import dataclass

from tests.cluster.machine import Machine
from tests.cluster.waiting import wait_until

SUBNET = "10.77.0"


@dataclass(frozen=True)
class Switch:
    """A bridge in the network namespace of `host`.

    The root network namespace is never touched, and no machine has a default route: no packet can leave.
    """

    host: Machine

    def power_on(self) -> None:
        """Make the bridge; `host` has its address 10.77.0.1."""
        self._ip("link", "add", "switch", "type", "bridge", "forward_delay", "0")
        self._ip("address", "add", f"{SUBNET}.1/24", "dev", "switch")
        self._ip("link", "set", "switch", "up")

    def connect(self, machine: Machine, port: int) -> None:
        """A cable from `port` to the machine's new eth0, which gets its address."""
        # The cable of a machine that crashed goes with its namespace, which the kernel clears a little later.
        wait_until(f"port {port} of the switch is free", lambda: not self._has(f"port{port}"))
        peer = ("peer", "name", "eth0", "netns", str(machine.pid))
        self._ip("link", "add", f"port{port}", "type", "veth", *peer)
        self._ip("link", "set", f"port{port}", "master", "switch", "up")
        machine.run("ip", "address", "add", f"{address(port)}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")

    def unplug(self, port: int) -> None:
        """Pull the cable out of `port`."""
        self._ip("link", "set", f"port{port}", "down")

    def plug(self, port: int) -> None:
        """Put it back."""
        self._ip("link", "set", f"port{port}", "up")

    def _has(self, interface: str) -> bool:
        return self.host.run("ip", "link", "show", "dev", interface, check=False).returncode == 0

    def _ip(self, *arguments: str) -> None:
        # `netns PID` names a process as it is counted out here.
        self.host.run("ip", *arguments, network_only=True)


def address(port: int) -> str:
    """Of the machine on the other end of the cable."""
    return f"{SUBNET}.{10 + port}"
