"""Every layout of a run tried: those that work by predicted speed, the others with the reason."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from foundation.accelerators import GIB, Device, in_nodes_of
from foundation.errors import ConfigError, RequestError
from launch.checks import check_any_layout, check_at_layout
from launch.config import RunConfig
from launch.planner.candidates import Candidate, candidates
from launch.planner.from_config import job_of
from launch.planner.job import Job
from launch.planner.memory import StageMemory, fits, fullest_stage, stage_memory
from launch.planner.step_time import StepTime, step_time
from model.counts import flops_per_token
from parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Choice:
    """A layout that works, with what is predicted of it."""

    candidate: Candidate
    job: Job
    time: StepTime
    memory: StageMemory
    tokens_per_second: float
    mfu: float

    def stages(self) -> list[StageMemory]:
        """Memory of every stage."""
        return [stage_memory(self.job, stage) for stage in range(self.job.pp)]


@dataclass(frozen=True)
class Refusal:
    """A layout that does not, and why. `short_gib` is what it lacks of memory, None for other reasons.

    `rows_help`: whether shorter rows could make it fit; they leave weights, gradients and optimizer as they are.
    """

    candidate: Candidate
    kind: str
    reason: str
    short_gib: float | None = None
    rows_help: bool = False


@dataclass(frozen=True)
class Plan:
    """What was found: choices from the fastest on, refusals in the order of trying."""

    choices: tuple[Choice, ...]
    refusals: tuple[Refusal, ...]


def search(config: RunConfig, device: Device, num_gpus: int, vocab_size: int, per_node: int | None = None) -> Plan:
    """Try every candidate.

    Args:
        config: the run.
        device: what it would run on.
        num_gpus: in all.
        vocab_size: true vocabulary.
        per_node: GPUs of one node, which tensor-parallel ranks do not leave; None for the device's usual.

    Raises:
        RequestError: no layout works; the message names the one that came nearest.
        ConfigError: the run breaks a rule at any layout.
    """
    try:
        check_any_layout(config)
    except ConfigError as error:
        raise config.origin.point(error) from None
    if config.training.precision == "fp8" and "fp8" not in device.tflops:
        raise ConfigError(
            "training.precision", "fp8", rule=f"is computed by tensor cores that {device.name} lacks",
            cure="training.precision=bf16",
        )  # fmt: skip
    versions: dict[tuple[int, str], RunConfig] = {}
    choices: list[Choice] = []
    refusals: list[Refusal] = []
    per_token = flops_per_token(config.model, config.training.seq_length, "causal", vocab_size)
    device = device if per_node is None else in_nodes_of(device, per_node)
    for candidate in candidates(config, device, num_gpus, per_node):
        key = candidate.micro_batch_size, candidate.recompute
        if key not in versions:
            versions[key] = _with(config, candidate)
        tried = _try(versions[key], candidate, device, vocab_size, per_token)
        if isinstance(tried, Choice):
            choices.append(tried)
        else:
            refusals.append(tried)
    if not choices:
        raise _nothing_works(refusals, config, device, num_gpus)
    choices.sort(key=lambda choice: (-choice.tokens_per_second, choice.memory.total))
    return Plan(tuple(choices), tuple(refusals))


def _with(config: RunConfig, candidate: Candidate) -> RunConfig:
    changes = {
        "micro_batch_size": candidate.micro_batch_size,
        "recompute_granularity": candidate.recompute,
        "recompute_num_layers": 1,
    }
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def layout_of(candidate: Candidate, config: RunConfig) -> ParallelLayout:
    """The grid of `candidate`; communication options are those of `Candidate.overrides`.

    Raises:
        ConfigError: the grid breaks a rule.
    """
    zero: Any = candidate.zero
    return ParallelLayout(
        tensor_model_parallel_size=candidate.tp,
        pipeline_model_parallel_size=candidate.pp,
        virtual_pipeline_model_parallel_size=candidate.vpp if candidate.vpp > 1 else None,
        context_parallel_size=candidate.cp,
        expert_model_parallel_size=candidate.ep,
        data_parallel_size=candidate.dp,
        sequence_parallel=candidate.tp > 1,
        zero_stage=zero,
        overlap_grad_reduce=candidate.dp > 1,
        overlap_param_gather=candidate.dp > 1 and candidate.zero == 1,
        grad_reduce_in_fp32=config.parallel.grad_reduce_in_fp32,
        pipeline_layers=candidate.pipeline_layers,
    )


def _try(config: RunConfig, candidate: Candidate, device: Device, vocab_size: int, flops: float) -> Choice | Refusal:
    try:
        layout = layout_of(candidate, config)
        check_at_layout(config, layout)
    except ConfigError as error:
        return Refusal(candidate, f"{error.field} {_without_numbers(error.rule or '')}", f"{error.what}: {error.rule}")
    job = job_of(config, layout, device, vocab_size)
    memory = fullest_stage(job)
    if not fits(job, memory):
        lacking = memory.gib - device.memory_gib
        needed = f"{memory.gib:.{1 if lacking >= 0.1 else 2}f}"  # not 79.1 of 79.1
        reason = f"stage {memory.stage} would need {needed} GiB of {device.memory_gib:g}: {_largest(memory)}"
        states = memory.weights + memory.gradients + memory.optimizer + memory.framework
        return Refusal(candidate, "memory", reason, lacking, rows_help=states < device.memory_gib * GIB)
    time = step_time(job)
    speed = time.tokens_per_second(job)
    return Choice(candidate, job, time, memory, speed, speed * flops / device.peak(job.arithmetic))


def _largest(memory: StageMemory) -> str:
    parts = {
        name: getattr(memory, name) / 2**30
        for name in ("weights", "gradients", "optimizer", "activations", "logits", "working")
    }
    first = sorted(parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {size:.1f}" for name, size in first)


def _without_numbers(rule: str) -> str:
    return "".join("#" if sign.isdigit() else sign for sign in rule).replace("##", "#").replace("##", "#")


def grouped(refusals: tuple[Refusal, ...]) -> Iterator[tuple[str, int, Refusal]]:
    """(kind, how many, one of them): the most frequent first; of those short of memory the one that lacks least."""
    kinds: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        kinds.setdefault(refusal.kind, []).append(refusal)
    for kind, members in sorted(kinds.items(), key=lambda item: -len(item[1])):
        yield kind, len(members), min(members, key=lambda one: one.short_gib or 0.0)


def _next_multiple(config: RunConfig, num_gpus: int) -> int:
    """The least batch of no fewer sequences than were asked for that any number of replicas divides."""
    return math.ceil(config.training.global_batch_size / num_gpus) * num_gpus


def _nothing_works(refusals: list[Refusal], config: RunConfig, device: Device, num_gpus: int) -> RequestError:
    short = [one for one in refusals if one.short_gib is not None]
    what = f"no layout of this run works on {num_gpus} x {device.name}"
    if short:
        nearest = min(short, key=lambda one: one.short_gib or 0.0)
        return RequestError(
            what,
            rule=f"{len(refusals)} were tried; the nearest, {nearest.candidate.describe()}: {nearest.reason}",
            cure="more GPUs, or GPUs with more memory" + (", or a shorter training.seq_length" * nearest.rows_help),
        )
    if refusals:
        kind, count, example = next(grouped(tuple(refusals)))
        batch = kind.startswith("training.global_batch_size")
        return RequestError(
            what,
            rule=f"{count} of {len(refusals)} break one rule, {example.candidate.describe()} for one: {example.reason}",
            cure=(f"training.global_batch_size={_next_multiple(config, num_gpus)}, or " if batch else "")
            + "another number of GPUs",
        )
    return RequestError(
        what,
        rule=f"{num_gpus} GPUs cannot be cut into tensor x pipeline x data parallel ranks for "
        f"{config.model.num_layers} layers",
        cure="a number of GPUs with a power of two in it",
    )
