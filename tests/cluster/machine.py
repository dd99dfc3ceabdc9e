"""One machine: network, host name, mounts, shared memory and processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.waiting import PATIENCE, ClusterError

INIT = Path(__file__).with_name("machine_init.py")
NAMESPACES = ("net", "uts", "mnt", "ipc", "pid")

PLAIN_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
}
"""What a fresh login has; nothing of pytest's own environment reaches the cluster."""


@dataclass(frozen=True)
class Blueprint:
    """What a machine is made of.

    Attributes:
        name: its host name.
        shared: folders that it sees under the same path as this process does, besides all that is not machine-local.
        binds: further mounts, {place: source}; places of one machine hide what all see there.
        gpus: device files to make, for Slurm to count.
        log: what its PID 1 says.
    """

    name: str
    shared: tuple[Path, ...]
    binds: Mapping[Path, Path]
    gpus: int
    log: Path


class Machine:
    """Boots, runs commands, crashes. Dies with the process that booted it, however that ends.

    `setpriv` asks the kernel to kill `unshare` when the thread that started it ends, so boot in a thread that lasts;
    `unshare --kill-child` does the same for the machine's PID 1, and with a PID 1 the kernel ends all its processes.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self._blueprint = blueprint
        self._keeper: subprocess.Popen[bytes] | None = None
        self._pid = self._pid_handle = -1

    @property
    def name(self) -> str:
        return self._blueprint.name

    @property
    def is_up(self) -> bool:
        return self._keeper is not None

    @property
    def pid(self) -> int:
        """Of its PID 1, as this process sees it."""
        if not self.is_up:
            raise ClusterError(f"{self.name} is off")
        return self._pid

    def power_on(self) -> None:
        """Start it; `wait_ready` tells when it is there, so that several can boot at once."""
        if self.is_up:
            raise ClusterError(f"{self.name} is up already")
        blueprint = self._blueprint
        wanted = {
            "name": blueprint.name,
            "shared": [str(path) for path in blueprint.shared],
            "binds": {str(place): str(source) for place, source in blueprint.binds.items()},
            "gpus": blueprint.gpus,
        }
        command = ["setpriv", "--pdeathsig", "KILL"]
        command += ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += [sys.executable, "-I", "-S", str(INIT), json.dumps(wanted)]
        with open(blueprint.log, "ab") as log:
            self._keeper = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=PLAIN_ENVIRONMENT,
                cwd="/",
                start_new_session=True,  # Ctrl-C is pytest's to handle
            )

    def wait_ready(self) -> None:
        """Until it can run commands; its loopback is up then."""
        assert self._keeper is not None and self._keeper.stdout is not None, "power_on comes first"
        with self._keeper.stdout as said:
            if not select.select([said], [], [], PATIENCE)[0] or said.readline() != b"ready\n":
                self.power_off()
                raise ClusterError(f"{self.name} did not boot:\n{self._blueprint.log.read_text(errors='replace')}")
        (first,) = psutil.Process(self._keeper.pid).children()
        self._pid, self._pid_handle = first.pid, os.pidfd_open(first.pid)
        self.run("ip", "link", "set", "lo", "up")

    def power_off(self) -> None:
        """Cut the power: no process of it gets a last word. Harmless where it is off."""
        if self._keeper is None:
            return
        if self._pid_handle >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pid_handle, signal.SIGKILL)
            os.close(self._pid_handle)
        else:
            self._keeper.kill()
        self._keeper.wait(PATIENCE)  # unshare ends after its child, and that after every process of the machine
        self._keeper, self._pid, self._pid_handle = None, -1, -1

    def command(self, *command: str, cwd: Path | str = "/", network_only: bool = False) -> list[str]:
        """`command` as it has to be started here to run inside the machine."""
        if network_only:
            return ["nsenter", "--target", str(self.pid), "--net", "--", *command]
        inside = [f"--{kind}" for kind in ("net", "uts", "mount", "ipc", "pid")]
        return ["nsenter", "--target", str(self.pid), *inside, f"--wdns={cwd}", "--", *command]

    def run(
        self,
        *command: str,
        seconds: float = PATIENCE / 2,
        cwd: Path | str = "/",
        environment: Mapping[str, str] | None = None,
        check: bool = True,
        network_only: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside the machine and wait for it.

        Args:
            seconds: it is killed after so many.
            cwd: where it runs.
            environment: on top of PLAIN_ENVIRONMENT.
            check: whether another exit code than 0 is an error.
            network_only: enter nothing but its network: files and process numbers are those of out here.

        Raises:
            ClusterError: it took too long, or failed where `check`.
        """
        limited = ["timeout", "--kill-after=1", f"{seconds:g}", *command]
        answer = subprocess.run(
            self.command(*limited, cwd=cwd, network_only=network_only),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**PLAIN_ENVIRONMENT, **(environment or {})},
            timeout=seconds + 60,
            check=False,
        )
        if answer.returncode in (124, 137):
            raise ClusterError(f"{self.name}: more than {seconds:g} s: {_shown(command, answer)}")
        if check and answer.returncode != 0:
            raise ClusterError(f"{self.name}: exit code {answer.returncode}: {_shown(command, answer)}")
        return answer

    def namespaces(self) -> set[str]:
        """Names of its namespaces as the kernel counts them, e.g. `net:[4026532201]`."""
        return {str(Path(f"/proc/{self.pid}/ns/{kind}").readlink()) for kind in NAMESPACES}

    def bytes_received(self, interface: str = "eth0") -> int:
        """Bytes that an interface took in since the machine booted."""
        lines = self.run("cat", "/proc/net/dev").stdout.splitlines()
        counters = dict(line.split(":", 1) for line in lines if ":" in line)
        by_name = {name.strip(): values.split() for name, values in counters.items()}
        return int(by_name[interface][0])


def _shown(command: Sequence[str], answer: subprocess.CompletedProcess[str]) -> str:
    return f"{' '.join(command)}\n{answer.stdout}{answer.stderr}"
