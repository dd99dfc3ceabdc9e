"""PID 1 of one machine of the cluster: makes its file systems and devices, says `ready`, then only buries orphans.

Started by `tests.cluster.machine` inside new namespaces, as a plain file with the standard library alone: the faster
it is up, the faster a machine boots. Its end takes every process of the machine along, as a power cut does.
"""

import ctypes
import json
import os
import signal
import socket
import stat
import sys
from pathlib import Path

MS_BIND = 0x1000
NULL_DEVICE = os.makedev(1, 3)
PRIVATE = ("/tmp", "/dev/shm", "/run")
"""Local to a machine; everything else is one file system that all machines share."""


def main() -> None:
    """Argument: JSON with name, shared (paths that all machines see), binds ({place: source}) and gpus (a number)."""
    wanted = json.loads(sys.argv[1])
    socket.sethostname(wanted["name"])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps orphans for a PID 1 that ignores their end
    hidden = [path for path in (*wanted["shared"], *wanted["binds"].values()) if Path(path).is_relative_to("/tmp")]
    held = {path: os.open(path, os.O_PATH) for path in hidden}  # from here on reachable only through these
    for place in PRIVATE:
        mount("tmpfs", place, "tmpfs", 0, "mode=1777")
    for path in wanted["shared"]:
        if path in held:
            Path(path).mkdir(parents=True, exist_ok=True)
            mount(f"/proc/self/fd/{held[path]}", path, None, MS_BIND)
    for place, source in wanted["binds"].items():
        if not Path(place).exists():
            Path(place).mkdir(parents=True)
        mount(f"/proc/self/fd/{held[source]}" if source in held else source, place, None, MS_BIND)
    for number in range(wanted["gpus"]):
        # Slurm counts a GPU where it finds a character device, and opens none.
        Path("/run/gpus").mkdir(exist_ok=True)
        os.mknod(f"/run/gpus/nvidia{number}", stat.S_IFCHR | 0o666, NULL_DEVICE)
    for descriptor in held.values():
        os.close(descriptor)
    print("ready", flush=True)
    while True:
        signal.pause()


def mount(source: str, place: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    library = ctypes.CDLL(None, use_errno=True)
    encoded = [None if text is None else text.encode() for text in (source, place, kind, options)]
    if library.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {place}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
