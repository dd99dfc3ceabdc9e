"""What can be known to go wrong before a job queues. Every refusal is one message; what is found well is noted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from data.config import check_files
from foundation.errors import ConfigError, RequestError
from launch.beginning import begin_training, with_kept_tokenizer
from launch.checks import check_sizes
from launch.config import RunConfig, load_config
from launch.run_folder import run_folder_is_writable
from launch.submission.further import options_leave_the_grid_alone
from launch.submission.request import CHECKOUT, Submission, is_image_file, shown
from launch.submission.slurm import Partition
from launch.submission.step_seconds import StepSeconds, step_seconds
from parallel.layout import ParallelLayout

SLURMS_OWN = frozenset("\\\n\r\t\0")
"""A backslash ends what Slurm replaces in a log's name; the others end the line of an option."""


@dataclass(frozen=True)
class Linted:
    """A submission that nothing is known to be wrong with.

    Attributes:
        config: the run; for post-training the training run that it amounts to.
        layout: its grid at the size that was asked for; for PPO the actor's.
        description: of everything that runs, for people.
        cpus_per_rank: resolved.
        notes: what was looked at, for people.
    """

    config: RunConfig
    layout: ParallelLayout
    description: str
    cpus_per_rank: int
    notes: tuple[str, ...]


def lint(asked: Submission, partition: Partition | str, gpu: str | None) -> Linted:
    """Check everything that can be checked here.

    Args:
        asked: the job.
        partition: where it would run; where it cannot be asked, why not.
        gpu: what it would run on, for the planner; None for what the partition says.

    Raises:
        RequestError: the first rule that is broken.
    """
    names_survive_slurm(asked)
    config, layout, description = run_and_layout(asked)
    notes = [f"{asked.world_size} ranks on {asked.nodes} nodes fill {description}"]
    notes += _tensor_ranks_apart(layout.tp, asked.ranks_per_node, asked.nodes)
    run_folder_is_writable(config)
    if asked.container is None:
        check_files(config.data, config.training.seq_length)
    else:
        container_sees(asked, config.run.folder.absolute())
        container_sees(asked, asked.config.absolute())
    if asked.container is not None and not is_image_file(asked.container):
        notes.append(f"container {asked.container} comes from a registry: not looked for; neither are the data")
    cpus = asked.cpus_per_rank
    if isinstance(partition, str):
        notes.append(f"{partition}: neither the partition, its GPUs nor its time limit were looked at")
    else:
        fits_partition(asked, partition)
        notes.append(_partition_note(asked, partition))
        cpus = cpus or max(1, fewest_cpus(asked, partition) // asked.ranks_per_node)
    known = None if isinstance(partition, str) else partition
    step = step_seconds(config, layout, gpu, known, asked.task, asked.gpus_per_node)
    notes += time_holds_a_checkpoint(asked, config, step)
    return Linted(config, layout, description, cpus or 8, tuple(notes))


def names_survive_slurm(asked: Submission) -> None:
    """No name holds what no line of a script can hold.

    Raises:
        RequestError: one does.
    """
    words = {"the working folder": str(Path.cwd()), "CONFIG.yaml": str(asked.config), "--partition": asked.partition,
             "--account": asked.account, "--qos": asked.qos, "--container": asked.container,
             "--mounts": asked.mounts}  # fmt: skip
    named = [(name, word) for name, word in words.items() if word is not None]
    named += [("an override", word) for word in asked.overrides] + [("--sbatch", word) for word in asked.further]
    for name, word in named:
        _refuse_words_of_slurm(name, word, (SLURMS_OWN - {"\\"}) | {chr(127)})
        if name in ("--partition", "--account", "--qos", "--container") and not word.strip():
            raise RequestError(f"{name} {word!r} is refused", rule="is a name", cure=f"leave {name} out, or name one")
    options_leave_the_grid_alone(asked.further)


def run_and_layout(asked: Submission) -> tuple[RunConfig, ParallelLayout, str]:
    """The run, the layout that it has at the size that was asked for, and all that runs in words.

    Raises:
        RequestError: the configuration cannot run so: the grid does not fill the nodes, a batch does not divide ...
    """
    if asked.task == "train":
        config = with_kept_tokenizer(load_config(asked.config, asked.overrides))
        layout = check_sizes(config, world_size=asked.world_size)
        begin_training(config, may_convert=False)
        description = layout.describe()
    else:
        from launch.alignment_config import PpoConfig, load_alignment_config
        from launch.alignment_run import sized_run

        aligned, ranks = load_alignment_config(asked.task, asked.config, asked.overrides), asked.world_size
        description = ""
        if isinstance(aligned, PpoConfig):
            from launch.ppo_check import resolved

            placement = resolved(aligned, asked.world_size)
            description, ranks = placement.explain(), placement.ranks[placement.station_of("actor")]
        config, layout = sized_run(aligned, ranks)
        description = description or layout.describe()
    _refuse_words_of_slurm("run.folder", str(config.run.folder), SLURMS_OWN)
    return config, layout, description


def container_sees(asked: Submission, path: Path) -> None:
    """The container mounts a folder above `path` under its own name.

    Raises:
        RequestError: it does not.
    """
    seen = [Path.cwd(), CHECKOUT]
    for mount in (asked.mounts or "").split(","):
        source, _, rest = mount.partition(":")
        if source and rest.partition(":")[0] in ("", source):
            seen.append(Path(source))
    if not any(path.is_relative_to(folder) for folder in seen):
        raise RequestError(
            f"{path} is not in the container",
            rule="ranks see the working folder, the checkout and --mounts, and paths under the same path as here",
            cure=f"--mounts {path.parent}:{path.parent}, or a path in the working folder",
        )


def fits_partition(asked: Submission, partition: Partition) -> None:
    """The partition takes such a job.

    Raises:
        RequestError: it has too few nodes of that kind, or its limits are lower.
    """
    name = f"partition {partition.name}"
    if not partition.up:
        raise RequestError(f"{name} takes no jobs", rule="its State is not UP", cure="--partition with another one")
    if partition.max_seconds is not None and asked.seconds > partition.max_seconds:
        raise RequestError(
            f"--time {shown(asked.seconds)} is refused",
            rule=f"is at most {name}'s MaxTime {shown(partition.max_seconds)}",
            cure=f"--time {shown(partition.max_seconds)}, and --chain "
            f"{math.ceil(asked.seconds / partition.max_seconds)} for as long in all",
        )
    if asked.gpus_per_node > partition.gpus:
        raise RequestError(
            f"--gpus-per-node {asked.gpus_per_node} is refused",
            rule=f"is at most the {partition.gpus} GPUs of a node of {name}",
            cure=f"--gpus-per-node {partition.gpus}, or another --partition",
        )
    most = len(partition.with_gpus(asked.gpus_per_node))
    if partition.max_nodes is not None:
        most = min(most, partition.max_nodes)
    if asked.nodes > most:
        raise RequestError(
            f"--nodes {asked.nodes} is refused",
            rule=f"is at most {most}, what {name} gives one job of {asked.gpus_per_node} GPUs a node",
            cure=f"--nodes {most}, or another --partition",
        )
    cpus = fewest_cpus(asked, partition)
    wanted = (asked.cpus_per_rank or 1) * asked.ranks_per_node
    if wanted > cpus:
        raise RequestError(
            f"{asked.ranks_per_node} ranks a node with {asked.cpus_per_rank or 1} CPUs each are refused",
            rule=f"take {wanted} CPUs, and a node of {name} has {cpus}",
            cure=f"--cpus-per-rank {max(1, cpus // asked.ranks_per_node)}",
        )


def fewest_cpus(asked: Submission, partition: Partition) -> int:
    """CPUs that every node has which the job may get."""
    return min(node.cpus for node in partition.with_gpus(asked.gpus_per_node))


def time_holds_a_checkpoint(asked: Submission, config: RunConfig, step: StepSeconds | None) -> list[str]:
    """The time limit leaves room for one checkpoint interval at least, or a job could end without any progress.

    Returns:
        What was found, for people.

    Raises:
        RequestError: it does not.
    """
    limit, lead = shown(asked.seconds), asked.lead_seconds // 60
    if asked.usable_seconds <= 0:
        raise RequestError(
            f"--time {limit} is refused",
            rule=f"is above {lead + 1} minutes: the ranks are asked to save {lead} minutes before the end, "
            "and Slurm may ask a minute early",
            cure=f"--time {shown(2 * (asked.lead_seconds + 60))}",
        )
    interval = config.checkpoint.interval
    if step is None:
        return [
            "not checked: whether --time holds a checkpoint interval. The run has no earlier steps, and the planner no "
            "prediction (--gpu h100 names the GPU, model.vocab_size the vocabulary)"
        ]
    found = [f"a step takes about {step.seconds:.3g} s ({step.source})"]
    if interval is None:
        return [*found, "checkpoint.interval is not set: the run saves when its time is over, and at its end"]
    needed = interval * step.seconds
    if needed > asked.usable_seconds:
        longer = shown(60 * math.ceil((needed + asked.seconds - asked.usable_seconds) / 60))
        steps = math.floor(asked.usable_seconds / step.seconds)
        raise RequestError(
            f"--time {limit} is refused",
            rule=f"is shorter than one checkpoint interval: {interval} steps of {step.seconds:.3g} s ({step.source}) "
            f"take {shown(needed)}, and the ranks are asked to save after {shown(asked.usable_seconds)}",
            cure=f"--time {longer}" + (f", or checkpoint.interval={steps}" if steps else ""),
        )
    whole = config.training.train_steps * step.seconds
    found.append(f"checkpoint.interval {interval} takes {shown(needed)}, the whole run {shown(whole)}")
    return found


def _tensor_ranks_apart(tensor_ranks: int, ranks_per_node: int, nodes: int) -> list[str]:
    """Tensor-parallel ranks are neighbours in rank (parallel/layout.py), and a node's ranks too."""
    if nodes == 1 or ranks_per_node % tensor_ranks == 0:
        return []
    works = max(size for size in range(1, tensor_ranks + 1) if ranks_per_node % size == 0)
    return [
        f"slow: tensor parallelism of {tensor_ranks} goes over the network, a node has {ranks_per_node} ranks; "
        f"parallel.tensor_model_parallel_size={works}, or a multiple of {tensor_ranks} ranks a node, keeps it inside"
    ]


def _partition_note(asked: Submission, partition: Partition) -> str:
    fitting = partition.with_gpus(asked.gpus_per_node)
    usable = sum(node.usable for node in fitting)
    limit = "no time limit" if partition.max_seconds is None else f"MaxTime {shown(partition.max_seconds)}"
    waits = f", {usable} of them up now: the job will wait" if usable < asked.nodes else ""
    return f"partition {partition.name}: {len(fitting)} nodes with {asked.gpus_per_node} GPUs or more{waits}; {limit}"


def _refuse_words_of_slurm(name: str, word: str, refused: frozenset[str] | set[str]) -> None:
    found = sorted(refused & set(word))
    if found:
        error = f"no {', '.join(map(repr, found))}: Slurm's options end there or change their meaning"
        if name == "run.folder":
            raise ConfigError(name, word, rule=f"holds {error}", cure="run.folder=runs/first")
        raise RequestError(f"{name} {word!r} is refused", rule=f"holds {error}", cure="another name")
