"""A real Slurm cluster: a controller and compute nodes, each a machine of its own, on one Linux computer."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType

from tests.cluster.jobs import ENDED, Job, logs_of
from tests.cluster.machine import Blueprint, Machine
from tests.cluster.network import Switch
from tests.cluster.slurm_config import CONTROLLER, ETC, LOGS, SPOOL, STATE, Shape, write_files
from tests.cluster.waiting import PATIENCE, ClusterError, wait_until

TAIL = 4000
"""Characters of each log that an error shows."""


class Cluster:
    """`with Cluster(folder) as cluster: cluster.sbatch(...)`. Needs root and Debian's Slurm packages.

    Args:
        folder: holds configuration, logs and state; empty or absent. On every machine under the same path.
        shape: how large it is.
        shared: further folders that every machine sees; needed for those below /tmp, which is local to a machine.

    Attributes:
        controller: runs munged and slurmctld; users log in there.
        nodes: the compute nodes by name.
    """

    def __init__(self, folder: Path, shape: Shape | None = None, shared: Collection[Path] = ()) -> None:
        self.folder, self.shape = folder.resolve(), shape or Shape()
        self._shared = (self.folder, *(path.resolve() for path in shared))
        self.controller = Machine(self._blueprint(CONTROLLER, {STATE: self.folder / "state"}, gpus=0))
        self.nodes = {
            name: Machine(self._blueprint(name, {SPOOL: self.folder / "spool" / name}, self.shape.gpus))
            for name in self.shape.names
        }
        self._switch = Switch(self.controller)

    def __enter__(self) -> Cluster:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self) -> None:
        """Boot all machines and wait until every node is idle."""
        try:
            self._make_files()
            machines = [self.controller, *self.nodes.values()]
            for machine in machines:
                machine.power_on()
            for machine in machines:
                machine.wait_ready()
            self._switch.power_on()
            self._start_controller()
            for name in self.nodes:
                self._join(name)
            self.wait_idle()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Cut the power of everything; nothing stays but the files in `folder`."""
        for machine in (*self.nodes.values(), self.controller):
            machine.power_off()

    # Nodes and their faults

    def crash(self, name: str) -> None:
        """A node's power fails: its processes and its network are gone at once."""
        self.nodes[name].power_off()

    def wait_missed(self, *names: str) -> None:
        """Until the controller knows that nodes are lost, and has requeued what ran there.

        A node that is back before that does not tell it: what ran there is missed at its next report, up to a
        minute later.
        """

        def all_down() -> bool:
            states = self.node_states()
            return all(states[name].startswith("down") for name in names)

        wait_until(f"{' and '.join(names)} are down", all_down, otherwise=self.logs)

    def boot(self, name: str) -> None:
        """A node that was down comes up and joins; its local disk is as it was."""
        self.nodes[name].power_on()
        self.nodes[name].wait_ready()
        self._join(name)

    def unplug(self, name: str) -> None:
        """Pull a node's network cable; everything on it runs on."""
        self._switch.unplug(self._port(name))

    def plug(self, name: str) -> None:
        """Put a node's network cable back."""
        self._switch.plug(self._port(name))

    def kill_slurmd(self, name: str) -> None:
        """Slurm's daemon on a node dies; job steps there live on."""
        pid = self.nodes[name].run("cat", "/run/slurmd.pid").stdout.strip()
        self.nodes[name].run("kill", "-KILL", pid)
        wait_until(f"slurmd of {name} is gone", lambda: not self._slurmd_runs(name))

    def start_slurmd(self, name: str) -> None:
        """Start it, also again."""
        self.nodes[name].run("slurmd")

    def report_in(self, name: str) -> None:
        """A node tells the controller that it is there; by itself that asks lost nodes about once in 50 s only."""
        pid = self.nodes[name].run("cat", "/run/slurmd.pid").stdout.strip()
        self.nodes[name].run("kill", "-HUP", pid)

    def kill_controller(self) -> None:
        """The controller dies without a last word, and is started anew. It knows the jobs that run."""
        self._save_running_jobs()
        self.controller.run("pkill", "--exact", "-KILL", "slurmctld")
        gone = ("pgrep", "--exact", "slurmctld")
        wait_until("its port is free", lambda: self.controller.run(*gone, check=False).returncode != 0)
        self._start_slurmctld()

    def node_states(self) -> dict[str, str]:
        """What Slurm thinks of each node: idle, mixed, allocated, down*, ..."""
        lines = self.ask("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return {line.split()[0]: line.split()[1] for line in lines}

    def wait_idle(self, seconds: float = PATIENCE) -> None:
        """Until every node is up and has nothing to do."""
        wait_until(
            "every node is idle",
            lambda: all(state == "idle" for state in self.node_states().values()),
            seconds,
            lambda: f"{self.node_states()}\n{self.logs()}",
        )

    # Jobs

    def sbatch(
        self, *arguments: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> int:
        """Submit a batch job as a person on the login node does; its number.

        Raises:
            ClusterError: Slurm refuses it.
        """
        command = ["sbatch", "--parsable", *map(str, arguments)]
        answer = self.controller.run(*command, cwd=cwd or self.folder, environment=environment)
        return int(answer.stdout.strip().partition(";")[0])

    def ask(self, *command: str) -> str:
        """What a command of Slurm answers that changes nothing: asked again where the controller did not answer in the
        five seconds that Slurm gives it here."""

        def look() -> str | None:
            answer = self.controller.run(*command, check=False)
            if any(busy in answer.stderr for busy in ("timed out", "Unable to contact")):
                return None
            if answer.returncode != 0:
                raise ClusterError(f"{' '.join(command)}: {answer.stderr}")
            return answer.stdout

        return wait_until(f"{command[0]} answers", look)

    def job(self, number: int) -> Job:
        """How a job is now."""
        return Job.parse(self.ask("scontrol", "--oneliner", "show", "job", str(number)))

    def wait(self, number: int, states: Collection[str] = ENDED, seconds: float = PATIENCE) -> Job:
        """The job, once it is in one of `states`.

        Raises:
            ClusterError: it is not within `seconds`, or ended in another state.
        """

        def look() -> Job | None:
            job = self.job(number)
            if job.has_ended and job.state not in states:
                raise ClusterError(f"{job} ended while waiting for {', '.join(sorted(states))}\n{self.logs()}")
            return job if job.state in states else None

        what = f"job {number} is {' or '.join(sorted(states))}"
        return wait_until(what, look, seconds, lambda: f"{self.job(number)}\n{self.node_states()}\n{self.logs()}")

    def signal_batch(self, number: int, name: str) -> None:
        """Send a signal to the batch script alone, as `#SBATCH --signal=B:...` does before the time limit."""
        self.controller.run("scancel", "--batch", f"--signal={name}", str(number))

    def restore(self) -> None:
        """End every job and mend every fault: as after `up`."""
        self.controller.run("scancel", "--user=root")
        listening = []  # slurmd that was started a moment ago reports by itself, and would end of being asked to
        for name in self.nodes:
            if not self.nodes[name].is_up:
                self.boot(name)
                continue
            self.plug(name)
            if self._slurmd_runs(name):
                listening.append(name)
            else:
                self.start_slurmd(name)
        for name, state in self.node_states().items():
            if state.endswith("*") and name in listening:  # does not respond
                self.report_in(name)
            if state.startswith("drain"):  # Slurm could not end a job there in time
                self.controller.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self.wait_idle()

    def logs(self) -> str:
        """The ends of what Slurm's daemons and the machines wrote."""
        said = logs_of(self.folder / "log")
        return "\n".join(f"--- {name}\n{text[-TAIL:]}" for name, text in said.items() if text.strip())

    # How it is made

    def _blueprint(self, name: str, own: Mapping[Path, Path], gpus: int) -> Blueprint:
        binds = {
            Path("/etc/hosts"): self.folder / "etc" / "hosts",
            Path("/etc/resolv.conf"): self.folder / "etc" / "resolv.conf",
            ETC: self.folder / "etc" / "slurm",
            LOGS: self.folder / "log",
            Path("/run/munge"): self.folder / "munge",  # a socket file works across networks: one munged serves all
            **own,
        }
        return Blueprint(name, self._shared, binds, gpus, self.folder / "log" / f"machine-{name}.log")

    def _make_files(self) -> None:
        write_files(self.folder / "etc", self.shape)
        for name in ("log", "munge", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

    def _start_controller(self) -> None:
        files = {
            "key-file": "munge.key",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        options = [f"--{option}=/run/munge/{name}" for option, name in files.items()]
        # --force: it warns of folders that others may write to, which those above a test's may be.
        self.controller.run("munged", "--force", "--num-threads=4", *options)
        self._start_slurmctld()

    def _start_slurmctld(self) -> None:
        self.controller.run("slurmctld")
        self.node_states()  # it answers

    def _join(self, name: str) -> None:
        """Connect a booted node to the network and to Slurm."""
        self._switch.connect(self.nodes[name], self._port(name))
        self.start_slurmd(name)

    def _save_running_jobs(self) -> None:
        """Slurm saves what has changed every five seconds at most: a job that began since would be forgotten."""
        file = self.folder / "state" / "job_state"

        def saved() -> float:
            return file.stat().st_mtime if file.exists() else 0.0

        before = saved()
        command = ("squeue", "--noheader", "--states=RUNNING", "--format=%S %A")
        for line in self.controller.run(*command, environment={"SLURM_TIME_FORMAT": "%s"}).stdout.splitlines():
            start, number = line.split()
            if int(start) + 1 > before:
                self.controller.run("scontrol", "update", f"JobId={number}", "Comment=saved")
                wait_until("the jobs that run are saved", lambda: saved() > before)
                return

    def _slurmd_runs(self, name: str) -> bool:
        return self.nodes[name].run("pgrep", "--exact", "slurmd", check=False).returncode == 0

    def _port(self, name: str) -> int:
        return self.shape.names.index(name) + 1
