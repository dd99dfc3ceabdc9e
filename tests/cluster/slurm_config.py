"""The files that Slurm reads on the cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.network import SUBNET, address

CONTROLLER = "ctl"
ETC = Path("/etc/slurm")
SPOOL = Path("/run/slurm")
"""A node's own disk: it outlives slurmd, and a crash of the node."""
STATE = Path("/run/slurmctld")
LOGS = Path("/run/log")


@dataclass(frozen=True)
class Shape:
    """How large the cluster is.

    Attributes:
        nodes: compute nodes, named n1, n2, ...
        cpus: of a node, as Slurm counts them; the machine under it may have fewer.
        memory_mib: of a node, as Slurm counts it.
        gpus: of a node, counted by Slurm and set in CUDA_VISIBLE_DEVICES; nothing can compute on them.
    """

    nodes: int = 4
    cpus: int = 4
    memory_mib: int = 4000
    gpus: int = 2

    @property
    def names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]


def write_files(folder: Path, shape: Shape) -> None:
    """Everything below `folder` that machines mount as /etc/hosts and /etc/slurm."""
    slurm = folder / "slurm"
    slurm.mkdir(parents=True)
    addresses = {CONTROLLER: f"{SUBNET}.1", **{name: address(port) for port, name in enumerate(shape.names, 1)}}
    hosts = [f"{where} {name}" for name, where in addresses.items()]
    (folder / "hosts").write_text(_lines(["127.0.0.1 localhost", *hosts]))
    (folder / "resolv.conf").write_text("# no name server is in reach\n")
    settings = {**_CONTROLLER_AND_NODES, **_WITHOUT_CGROUPS, **_SCHEDULING, **_PATIENCE, "GresTypes": "gpu"}
    (slurm / "slurm.conf").write_text(
        _lines([*(f"{key}={value}" for key, value in settings.items()), *_nodes(shape), *_partitions(shape)])
    )
    (slurm / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n")
    gpus = f"Name=gpu File=/run/gpus/nvidia[0-{shape.gpus - 1}]" if shape.gpus else "# none"
    (slurm / "gres.conf").write_text(_lines([gpus]))


_CONTROLLER_AND_NODES = {
    "ClusterName": "orthant",
    "SlurmctldHost": f"{CONTROLLER}({SUBNET}.1)",
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    # A requeued job waits until its credential has expired, 120 s by default.
    "AuthInfo": "cred_expire=5",
    "StateSaveLocation": f"{STATE}",
    "SlurmdSpoolDir": f"{SPOOL}",
    "SlurmctldPidFile": "/run/slurmctld.pid",
    "SlurmdPidFile": "/run/slurmd.pid",
    "SlurmctldLogFile": f"{LOGS}/slurmctld.log",
    "SlurmdLogFile": f"{LOGS}/slurmd-%n.log",
    "SlurmctldDebug": "verbose",
    "SlurmdDebug": "verbose",
    # Nodes may declare more CPUs than the machine under them has.
    "SlurmdParameters": "config_overrides",
    "ReturnToService": 2,
    "MpiDefault": "none",
}

_WITHOUT_CGROUPS = {
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/linux",
}

_SCHEDULING = {
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core",
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0",
    "PriorityType": "priority/basic",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "JobRequeue": 1,
    "MinJobAge": 3600,  # a job that ended can still be asked about
}

_PATIENCE = {
    "MessageTimeout": 5,
    "SlurmdTimeout": 10,
    "SlurmctldTimeout": 10,
    "BatchStartTimeout": 10,
    "KillWait": 10,
    "InactiveLimit": 0,
    "Waittime": 0,
    "CompleteWait": 0,
}


def _nodes(shape: Shape) -> Iterable[str]:
    size = f"CPUs={shape.cpus} Sockets=1 CoresPerSocket={shape.cpus} ThreadsPerCore=1 RealMemory={shape.memory_mib}"
    gpus = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    for port, name in enumerate(shape.names, 1):
        yield f"NodeName={name} NodeAddr={address(port)} {size}{gpus}"


def _partitions(shape: Shape) -> Iterable[str]:
    """`all` for everything; a job in `urgent` takes the nodes of one in `spot`, which gets a time of grace."""
    nodes = f"Nodes={','.join(shape.names)} State=UP"
    yield f"PartitionName=all {nodes} Default=YES MaxTime=INFINITE PriorityTier=10"
    yield f"PartitionName=spot {nodes} MaxTime=1:00:00 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60"
    yield f"PartitionName=urgent {nodes} MaxTime=1:00:00 PriorityTier=20"


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
