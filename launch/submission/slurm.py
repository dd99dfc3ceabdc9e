"""What Slurm says of itself, asked through its commands; None where there is no Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from foundation.errors import RequestError, WorkError
from launch.submission.request import duration

ANSWER_SECONDS = 60
_FIELD = re.compile(r"(?:^|\s)(\w+)=(\S*)")
_GPU = re.compile(r"gpu(?::(?:\(null\)|(?P<type>[^:(,]+)))?:(?P<count>\d+)(?:\([^)]*\))?")
_UNLIMITED = ("UNLIMITED", "INFINITE", "NONE", "")
_NO_CONFIGURATION = re.compile(r"configuration (source|file)|slurm\.conf")
_FINDS_SLURM = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})
_STANDS_FOR = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_JOB_NAME": "job-name",
    "SBATCH_NO_REQUEUE": "requeue",
    "SBATCH_OPEN_MODE": "open-mode",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_TIMELIMIT": "time",
}
"""Variables that sbatch heeds more than the same option in a script."""


class NoClusterError(RequestError):
    """Slurm's commands are here, and nothing tells them of a cluster."""


@dataclass(frozen=True)
class Node:
    """One node of a partition."""

    name: str
    gpus: int
    gpu_type: str | None
    cpus: int
    usable: bool
    """Neither down nor drained at the moment."""


@dataclass(frozen=True)
class Partition:
    """One partition.

    Attributes:
        max_seconds: its longest time limit; None without one.
        max_nodes: the most nodes of a job; None without a limit.
        up: whether it takes jobs.
        nodes: its nodes.
    """

    name: str
    max_seconds: int | None
    max_nodes: int | None
    up: bool
    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> int:
        """GPUs of the node that has most."""
        return max((node.gpus for node in self.nodes), default=0)

    def with_gpus(self, count: int) -> list[Node]:
        """Its nodes with so many GPUs at least."""
        return [node for node in self.nodes if node.gpus >= count]


def slurm_is_here() -> bool:
    """Whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def find_partition(name: str | None) -> Partition:
    """The partition `name`, or the one that jobs go to by default.

    Raises:
        RequestError: there is none of that name, or no default; NoClusterError where Slurm is not configured here.
        WorkError: Slurm does not answer.
    """
    lines = ask("scontrol", "--oneliner", "show", "partition").splitlines()
    known = [dict(_FIELD.findall(line)) for line in lines if line.strip()]
    names = [fields.get("PartitionName", "") for fields in known]
    found = next(
        (one for one in known if (one.get("PartitionName") == name if name else one.get("Default") == "YES")), None
    )
    if found is None:
        raise RequestError(
            f"--partition {name} is refused" if name else "no partition is named, and Slurm has no default",
            rule=f"partitions are {', '.join(names)}",
            cure=f"--partition {names[0]}" if names else "ask whoever keeps this Slurm",
        )
    partition = found["PartitionName"]
    nodes = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%G|%c|%T").splitlines()
    return Partition(
        name=partition,
        max_seconds=None if found.get("MaxTime", "") in _UNLIMITED else duration(found["MaxTime"]),
        max_nodes=None if found.get("MaxNodes", "") in _UNLIMITED else int(found["MaxNodes"]),
        up=found.get("State") == "UP",
        nodes=tuple(parse_node(line) for line in nodes if line.strip()),
    )


def parse_node(line: str) -> Node:
    """A line of `sinfo --format=%N|%G|%c|%T`; generic resources read `gpu:h100:8(S:0-1),nic:2`."""
    name, resources, cpus, state = line.strip().split("|")
    gpus = list(_GPU.finditer(resources))
    return Node(
        name=name,
        gpus=sum(int(one["count"]) for one in gpus),
        gpu_type=gpus[0]["type"] if gpus else None,
        cpus=int(cpus.rstrip("+")),
        usable=not re.match(r"down|drain|fail|maint|unk", state) and not state.endswith("*"),
    )


def queued_scripts() -> dict[int, Path]:
    """The scripts of this person's jobs that have not ended, by job number.

    Raises:
        NoClusterError: Slurm is not configured here.
        WorkError: Slurm does not answer.
    """
    lines = ask("squeue", "--noheader", "--me", "--all", "--format=%A|%o").splitlines()
    pairs = [line.strip().partition("|") for line in lines]
    return {int(number): Path(script) for number, _, script in pairs if number.isdigit()}


def submit_script(path: Path, text: str, *options: str) -> int:
    """Submit a script that is `text`, and say the job's number.

    What a job that we are inside was told about itself stays here: the new one would take it for its own where Slurm
    tells it nothing (SLURM_MEM_PER_NODE, where it asks for all memory), and srun in it too (SLURM_CPU_BIND). So does
    what would overrule the script.

    Raises:
        NoClusterError: Slurm is not configured here.
        WorkError: Slurm refuses it or does not answer.
    """
    said = set(re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE))
    given = {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith("SLURM_") or name in _FINDS_SLURM) and _STANDS_FOR.get(name) not in said
    }
    answer = ask("sbatch", "--parsable", *options, str(path), environment=given)
    return int(answer.strip().partition(";")[0])


def ask(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """What one of Slurm's commands prints.

    Raises:
        NoClusterError: Slurm is not configured here.
        WorkError: it fails, with what it said.
    """
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise WorkError(
            f"{command[0]} did not answer within {ANSWER_SECONDS} s", cure="see whether slurmctld runs: scontrol ping"
        ) from None
    if answer.returncode != 0:
        said = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
        if said and "fatal" in said[-1] and _NO_CONFIGURATION.search(said[-1]):
            raise NoClusterError(
                "Slurm is installed on this machine, and knows no cluster",
                where=" ".join(command),
                rule="Slurm's commands find slurm.conf: in /etc/slurm, by SLURM_CONF, or by their network's DNS",
                cure="submit on a login node, or export SLURM_CONF=/path/to/slurm.conf",
            )
        raise WorkError(f"{command[0]} failed: {said[-1] if said else answer.returncode}", where=" ".join(command))
    return answer.stdout
