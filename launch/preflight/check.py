"""The look at every node before ranks join each other: through files of the run's folder and plain TCP."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from foundation.errors import FaultError
from foundation.files import write_text
from launch.meeting import nobody_ends, start_key
from launch.preflight.judgement import Node, unfit
from launch.preflight.links import TOKEN_BYTES, Answering, Leader, Links, find_links
from launch.world import World
from training.survival.config import PreflightConfig
from training.survival.network import own_address
from training.survival.verdict import listed

FOLDER = "preflight"
REPORT = "preflight.json"
BAD_NODES = "bad_nodes.txt"
POLL_SECONDS = 0.05
PACKAGES = ("alignment", "checkpoint_tools", "data", "foundation", "launch", "model", "parallel", "training")


def number_of_nodes(world: World, environment: Mapping[str, str] = os.environ) -> int:
    """Nodes of a world that srun or torchrun announced."""
    if "LOCAL_WORLD_SIZE" in environment and "RANK" in environment:
        return -(-world.world_size // int(environment["LOCAL_WORLD_SIZE"]))
    return int(environment.get("SLURM_STEP_NUM_NODES", "1"))


def look_before_step_0(
    config: PreflightConfig, folder: Path, world: World, listen: Callable[[], None] = nobody_ends
) -> None:
    """Check all nodes, where the configuration asks for it; every rank calls it.

    Args:
        listen: to the other ranks; raises where one of them ends.

    Raises:
        FaultError: a node is not fit, or ranks did not come; the same on every rank.
    """
    several = number_of_nodes(world) > 1
    if config.nodes == "never" or (config.nodes == "several" and not several):
        return
    Check(config, folder, world, listen=listen).run()


class _CalledAnew(Exception):
    """Rank 0 has begun another check."""


@dataclass
class Check:
    """One rank's part of the check.

    Attributes:
        folder: of the run; on a file system that all nodes share.
        clock: of this node.
        listen: to the other ranks; raises where one of them ends.
    """

    config: PreflightConfig
    folder: Path
    world: World
    clock: Callable[[], float] = time.time
    versions: Callable[[], dict[str, str]] = field(default_factory=lambda: own_versions)
    node: str = ""
    listen: Callable[[], None] = nobody_ends

    def run(self) -> None:
        """As `look_before_step_0`."""
        self.node = self.node or socket.gethostname()
        self._end = time.monotonic() + self.config.timeout_seconds
        self._pace = POLL_SECONDS + self.world.world_size / 4000  # of rank 0, which looks for the files of all
        try:
            while not self._ran():
                pass
        except OSError as error:
            raise FaultError(
                f"pre-flight check: rank {self.world.rank} on {self.node}: {error.strerror or error}",
                where=str(error.filename or self.folder),
                cure=f"mend the node's file systems, or leave it out: sbatch --exclude={self.node} ...",
            ) from error

    def _ran(self) -> bool:
        """False where rank 0 calls anew: what this rank read was left by an earlier start."""
        key = hashlib.sha256(start_key().encode()).hexdigest()[:16]
        self._place = self.folder / FOLDER / key
        if self.world.rank == 0:
            self._clear()
        self._token = self._called()
        try:
            verdict = self._met()
        except _CalledAnew:
            return False
        if verdict["text"]:
            raise FaultError(
                verdict["text"],
                where=str(self.folder / REPORT),
                cure=f"mend them, or leave them out: sbatch --exclude={','.join(verdict['bad'])} ..."
                if verdict["bad"]
                else "see what became of these ranks in their logs; preflight.timeout_seconds says how long to wait",
            )
        return True

    def _met(self) -> dict[str, Any]:
        """Say what this rank knows, ask the others, and hear the verdict."""
        with Answering(bytes.fromhex(self._token), self.clock) if self._leads else nullcontext() as server:
            self._write(self._file("here", self.world.rank), self._hello(server))
            if self.world.rank == 0:
                self._call_leaders()
            if self._leads:
                self._ask_others()
            return self._judge() if self.world.rank == 0 else self._wait(self._place / "verdict.json")

    @property
    def _leads(self) -> bool:
        return self.world.local_rank == 0

    def _clear(self) -> None:
        """Rank 0: what another start left is gone, and the token of this one is there."""
        for older in (self.folder / FOLDER).glob("*"):
            shutil.rmtree(older, ignore_errors=True)
        self._place.mkdir(parents=True, exist_ok=True)
        (self.folder / BAD_NODES).unlink(missing_ok=True)
        write_text(self._place / "call.json", json.dumps({"token": secrets.token_hex(TOKEN_BYTES)}))

    def _called(self) -> str:
        while True:
            said = _read(self._place / "call.json")
            if said is not None:
                return str(said["token"])
            self._pause(f"{self.folder} is not the folder that rank 0 writes to, or rank 0 does not come")

    def _hello(self, server: Answering | None) -> dict[str, Any]:
        if server is None:
            return {"node": self.node}
        return {
            "leader": asdict(Leader(self.world.rank, self.node, self._address(), server.port)),
            "about": asdict(Node(self.node, self.versions(), shutil.disk_usage(self.folder).free)),
            "node": self.node,
        }

    def _address(self) -> str:
        try:
            return own_address()
        except OSError as error:
            raise FaultError(
                f"pre-flight check: rank {self.world.rank} on {self.node} finds no way to "
                f"{os.environ.get('MASTER_ADDR')} ({error.strerror})",
                cure="name the interface between the nodes: ORTHANT_INTERFACE=eth0, or GLOO_SOCKET_IFNAME=eth0",
            ) from None

    def _call_leaders(self) -> None:
        """Rank 0: once all ranks are there, tell leaders of each other."""
        hellos: dict[int, dict[str, Any]] = {}
        while len(hellos) < self.world.world_size:
            for rank in range(self.world.world_size):
                if rank not in hellos and (said := self._said("here", rank)) is not None:
                    hellos[rank] = said
            if time.monotonic() > self._end:
                self._give_up(hellos)
                break
            self.listen()
            time.sleep(self._pace)
        self._hellos = [hellos[rank] for rank in sorted(hellos) if "leader" in hellos[rank]]
        self._write(self._place / "roster.json", {"leaders": [said["leader"] for said in self._hellos]})

    def _give_up(self, hellos: Mapping[int, Mapping[str, Any]]) -> None:
        missing = [rank for rank in range(self.world.world_size) if rank not in hellos]
        nodes = sorted({str(said["node"]) for said in hellos.values()})
        text = (
            f"pre-flight check: {len(missing)} of {self.world.world_size} ranks did not come within "
            f"{self.config.timeout_seconds:g} s: {listed(missing)}; these nodes are there: {', '.join(nodes)}"
        )
        self._decide({}, text, [])

    def _ask_others(self) -> None:
        roster = self._wait(self._place / "roster.json")
        leaders = [Leader(**values) for values in roster["leaders"]]
        (own,) = [leader for leader in leaders if leader.rank == self.world.rank]
        bandwidth = self.config.min_bandwidth_gb_per_second > 0
        token = bytes.fromhex(self._token)
        links = find_links(own, leaders, token, bandwidth=bandwidth, clock=self.clock)
        self._write(self._file("links", self.world.rank), asdict(links))

    def _judge(self) -> dict[str, Any]:
        """Rank 0's last word, which every rank reads."""
        decided = _read(self._place / "verdict.json")
        if decided is not None:
            return decided
        nodes = [Node(**said["about"]) for said in self._hellos]
        links = []
        for said in self._hellos:
            found = self._wait(self._file("links", said["leader"]["rank"]), missing=said["node"])
            links.append(Links(**{name: found[name] for name in Links.__dataclass_fields__}))
        bad = unfit(nodes, links, self.config)
        lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in bad.items()]
        headline = f"pre-flight check: {len(bad)} of {len(nodes)} nodes {'is' if len(bad) == 1 else 'are'} not fit"
        text = "\n".join([headline, *lines]) if bad else ""
        return self._decide(bad, text, [asdict(link) for link in links])

    def _decide(self, bad: Mapping[str, list[str]], text: str, links: list[dict[str, Any]]) -> dict[str, Any]:
        verdict = {"token": self._token, "bad": bad, "text": text}
        report = {"bad": bad, "nodes": [said["about"] for said in getattr(self, "_hellos", [])], "links": links}
        write_text(self.folder / REPORT, json.dumps(report, indent=1) + "\n")
        if bad:
            names = "".join(f"{name}\n" for name in bad)
            # The batch script reads it where it knows it: it may leave these nodes out when it requeues the job.
            for place in (str(self.folder / BAD_NODES), os.environ.get("ORTHANT_BAD_NODES", "")):
                if place:
                    write_text(Path(place), names)
        self._write(self._place / "verdict.json", verdict)
        return verdict

    def _file(self, kind: str, rank: int) -> Path:
        return self._place / f"{kind}-{rank:05d}.json"

    def _write(self, path: Path, values: Mapping[str, Any]) -> None:
        write_text(path, json.dumps({**values, "token": self._token}))

    def _said(self, kind: str, rank: int) -> dict[str, Any] | None:
        said = _read(self._file(kind, rank))
        return said if said is not None and said["token"] == self._token else None

    def _wait(self, path: Path, missing: str = "rank 0") -> dict[str, Any]:
        while True:
            said = _read(path)
            if said is not None and said["token"] == self._token:
                return said
            call = _read(self._place / "call.json")
            if call is not None and call["token"] != self._token:
                raise _CalledAnew
            verdict = _read(self._place / "verdict.json")
            if verdict is not None and verdict["token"] == self._token and verdict["text"]:
                raise FaultError(verdict["text"], where=str(self.folder / REPORT))
            self._pause(f"{missing} said nothing more")

    def _pause(self, why: str) -> None:
        """Raises FaultError where it has taken too long; rank 0 waits no longer than the others."""
        self.listen()
        if time.monotonic() > self._end + (0.0 if self.world.rank == 0 else 30.0):
            raise FaultError(
                f"pre-flight check: {why} within {self.config.timeout_seconds:g} s, as rank {self.world.rank} on "
                f"{self.node} sees it",
                cure="put run.folder on a file system that all nodes share; preflight.timeout_seconds=N waits longer",
            )
        time.sleep(POLL_SECONDS)


def own_versions() -> dict[str, str]:
    """What has to be the same on all nodes."""
    found = {"python": platform.python_version()}
    for package in ("torch", "megatron-core", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return {**found, "orthant": source_digest(Path(__file__).parents[2])}


def source_digest(root: Path) -> str:
    """Of our own source files: the same commit with other edits is another program."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _read(path: Path) -> dict[str, Any] | None:
    """A whole JSON object, None where there is none (yet)."""
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None
