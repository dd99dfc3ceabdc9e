"""How long a step takes, before it is run: as the run's earlier steps did, or as the planner predicts."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from foundation.accelerators import find_device, in_nodes_of
from foundation.errors import RequestError
from launch.config import RunConfig
from launch.planner.from_config import job_of
from launch.planner.step_time import step_time
from launch.planner.vocabulary import vocabulary_of
from launch.run_records import METRICS, read_lines
from launch.submission.request import Task
from launch.submission.slurm import Partition
from parallel.layout import ParallelLayout

ROWS = {"train": 1, "sft": 1, "reward": 2, "dpo": 2}
"""That one of the batch is: both answers of a pair. Iterations of PPO count the tokens of answers."""

ENOUGH, WARM_UP = 100, 3
"""Steps looked at, the newest; the first ones of all warm up."""


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step, and where they come from."""

    seconds: float
    source: str


def step_seconds(
    config: RunConfig,
    layout: ParallelLayout,
    gpu: str | None,
    partition: Partition | None,
    task: Task,
    gpus_per_node: int,
) -> StepSeconds | None:
    """The best knowledge there is; None where there is none.

    Args:
        config: the run; for post-training the training run that it amounts to.
        layout: as it will run.
        gpu: what it runs on, as a person says.
        partition: where it runs; its nodes may say what GPUs they have.
        task: what the ranks run.
        gpus_per_node: 0 for ranks on CPUs.

    Raises:
        RequestError: no accelerator is known as `gpu`.
    """
    training, rows = config.training, ROWS.get(task)
    batch = {name: getattr(training, name) * (rows or 1) for name in ("global_batch_size", "micro_batch_size")}
    config = config.model_copy(update={"training": training.model_copy(update=batch)})
    measured = _measured(config, any_batch=rows is None)
    if measured is not None or rows is None:  # the planner knows no sampling
        return measured
    kinds = {node.gpu_type for node in partition.nodes if node.gpu_type} if partition is not None else set()
    if gpu is None and len(kinds) != 1:
        return None
    try:
        device = find_device(gpu or kinds.pop())
    except RequestError:
        if gpu is not None:
            raise
        return None  # a name that the site gave its GPUs
    try:
        vocab_size = vocabulary_of(config)
    except RequestError:
        return None  # it is that of a tokenizer, which the run will read
    device = in_nodes_of(device, gpus_per_node) if gpus_per_node else device
    seconds = step_time(job_of(config, layout, device, vocab_size)).total
    return StepSeconds(seconds, f"predicted by the planner for {device.name}")


def _measured(config: RunConfig, *, any_batch: bool) -> StepSeconds | None:
    """Of the run's own steps, where they had this batch."""
    tokens = config.training.global_batch_size * config.training.seq_length
    lines = read_lines(config.run.folder / METRICS, ("step", "tokens", "step_seconds"))[WARM_UP:][-ENOUGH:]
    same = [line["step_seconds"] for line in lines if any_batch or line["tokens"] == line["step"] * tokens]
    if not same:
        return None
    return StepSeconds(statistics.median(same), f"median of {len(same)} earlier steps in {config.run.folder / METRICS}")
