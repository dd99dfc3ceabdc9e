"""A configuration made small enough to verify in seconds: the same family, features and parallel options.

What is kept is whatever chooses another path through the code: QK-norm, biases, tied embeddings, rotary scaling, a
window, grouped queries and how they meet the tensor-parallel ranks, every parallel option, how documents share a
sequence. What shrinks are sizes, which only choose how long the same path takes. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from launch.checks import check_sizes
from launch.config import RunConfig, as_values, config_from
from model.config import ModelConfig, RopeScaling
from parallel.layout import ParallelLayout

HIDDEN, FFN = 64, 96
VOCABULARY = 131
"""Prime, so that every tensor-parallel size has to pad it."""
SEQUENCE = 32
WINDOW = 7
ORIGINAL_POSITIONS = 16
"""Below SEQUENCE, so that stretched frequencies are reached."""
BUCKET = 20_000
"""Parameters in a bucket: several buckets in the small model, as core's 40,000,000 gives several in a large one."""
STEPS = 3


@dataclass(frozen=True)
class Devices:
    """Where the small configuration's layout runs.

    Attributes:
        most_ranks: that fit.
        limit: what they fit, for people.
        gpus: whether on GPUs, by the configuration's own kernels, and not on a CPU by torch's.
    """

    most_ranks: int
    limit: str
    gpus: bool

    @classmethod
    def cpu(cls, most_ranks: int) -> Devices:
        """As many processes as asked for."""
        return cls(most_ranks, f"{most_ranks} ranks (--max-ranks)", gpus=False)


@dataclass(frozen=True)
class Shrunk:
    """What is verified in place of a configuration.

    Attributes:
        config: the small configuration; its `parallel` section names every size.
        asked: the layout of the configuration as it was given, for people.
        layout: the one that is verified.
        notes: what differs from what was asked, for people.
    """

    config: RunConfig
    asked: str
    layout: ParallelLayout
    notes: tuple[str, ...]


def shrink(config: RunConfig, devices: Devices) -> Shrunk:
    """The small configuration for `config`, of no more ranks than `devices` have.

    Raises:
        ConfigError: `config` itself breaks a rule.
    """
    asked = check_sizes(config, world_size=_world_size(config))
    sizes = _sizes(asked, devices.most_ranks)
    stages = _stage_layers(config.model, asked, sizes["pp"])
    parallel = _parallel(asked, sizes, stages)
    parallel["tp_comm_overlap"] = _overlaps_tensors(config, devices) and sizes["tp"] > 1
    chunks = parallel["virtual_pipeline_model_parallel_size"] or 1
    model = _model(config.model, asked, sizes["tp"], sum(stages) * chunks)
    if devices.gpus:
        model |= config.model.model_dump(mode="json", include={"kernels", "kernel_overrides"})
    _shrink_experts(model, asked, parallel["expert_model_parallel_size"])
    short = _training(config, asked, sizes, stages)
    if parallel["tp_comm_overlap"]:
        short["training"]["precision"] = "bf16"  # what its buffers hold
    small = config_from(as_values(config) | {"model": model, "parallel": parallel} | short)
    layout = check_sizes(small, world_size=None)
    notes = (*_size_notes(config, asked, layout, devices), *_arithmetic_notes(config, devices))
    return Shrunk(small, _describe(config, asked), layout, notes)


def _world_size(config: RunConfig) -> int | None:
    """Of the smallest world in which every parallel option does something, where the replicas are left to it."""
    parallel = config.parallel
    if not _replicas_are_open(config):
        return None
    least = 2 if parallel.overlap_grad_reduce else 1
    experts = parallel.expert_model_parallel_size
    replicas = math.lcm(least, experts // math.gcd(experts, parallel.context_parallel_size))
    return replicas * (
        parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
    )


def _replicas_are_open(config: RunConfig) -> bool:
    """Whether the world decides how many replicas there are and the configuration counts on more than one."""
    parallel = config.parallel
    counts = parallel.overlap_grad_reduce or parallel.expert_model_parallel_size > 1
    return parallel.data_parallel_size is None and counts


def _describe(config: RunConfig, asked: ParallelLayout) -> str:
    described = asked.describe()
    return described.replace(f"DP{asked.dp}", "any DP") if _replicas_are_open(config) else described


def _sizes(asked: ParallelLayout, max_ranks: int) -> dict[str, int]:
    """tp, cp, pp and dp that fit into `max_ranks`.

    Two of each takes every path that more take, so sizes are halved down to 2 first, the larger of pipeline and tensor
    first; below that the replicas go, which share the least code with the rest.
    """
    sizes = {"tp": asked.tp, "cp": asked.cp, "pp": asked.pp, "dp": min(asked.dp, 2)}
    while math.prod(sizes.values()) > max_ranks and (axis := _next_to_halve(sizes)) is not None:
        sizes[axis] //= 2
    return sizes


def _next_to_halve(sizes: dict[str, int]) -> str | None:
    large = [axis for axis in ("pp", "tp", "cp") if sizes[axis] > 2]
    if large:
        return max(large, key=lambda axis: sizes[axis])
    return next((axis for axis in ("dp", "pp", "cp", "tp") if sizes[axis] > 1), None)


def _size_notes(config: RunConfig, asked: ParallelLayout, layout: ParallelLayout, devices: Devices) -> list[str]:
    notes = [
        f"{what}-parallel size {getattr(layout, axis)} in place of {getattr(asked, axis)}, to fit {devices.limit}"
        for axis, what in (("tp", "tensor"), ("cp", "context"), ("pp", "pipeline"), ("ep", "expert"))
        if getattr(layout, axis) != getattr(asked, axis)
    ]
    if layout.dp < min(asked.dp, 2):
        notes.append(f"one replica only, to fit {devices.limit}: nothing is reduced between replicas")
    elif _replicas_are_open(config):
        notes.append(f"{layout.dp} replicas: their number is left to the world")
    elif asked.dp > 2:
        notes.append(f"2 replicas in place of {asked.dp}")
    if layout.world_size == 1 and not devices.gpus:
        notes.append("this layout is one rank: both runs are the same; ask for more with parallel.* settings")
    return notes


def _stage_layers(model: ModelConfig, asked: ParallelLayout, stages: int) -> list[int]:
    """Layers of each stage (of each of its chunks): few, and uneven where the configuration's are."""
    if asked.pipeline_layers is None or stages == 1:
        of_a_chunk = model.num_layers // (asked.pp * asked.vpp)
        return [min(of_a_chunk, 2 if stages * asked.vpp <= 4 else 1)] * stages
    borders = [round(stage * asked.pp / stages) for stage in range(stages + 1)]
    joined = [sum(asked.pipeline_layers[first:last]) for first, last in pairwise(borders)]
    by_size = {size: place + 1 for place, size in enumerate(sorted(set(joined)))}
    return [by_size[size] for size in joined]


def _parallel(asked: ParallelLayout, sizes: dict[str, int], stages: list[int]) -> dict[str, Any]:
    uneven = asked.pipeline_layers is not None and sizes["pp"] > 1
    shared = sizes["dp"] * sizes["cp"] > 1  # ZeRO-2 and 3 shard over replicas
    return {
        "tensor_model_parallel_size": sizes["tp"],
        "pipeline_model_parallel_size": sizes["pp"],
        "virtual_pipeline_model_parallel_size": asked.virtual_pipeline_model_parallel_size if sizes["pp"] > 1 else None,
        "context_parallel_size": sizes["cp"],
        "expert_model_parallel_size": math.gcd(asked.ep, sizes["cp"] * sizes["dp"]),
        "data_parallel_size": sizes["dp"],
        "sequence_parallel": asked.sequence_parallel and sizes["tp"] > 1,
        "zero_stage": asked.zero_stage if shared else min(asked.zero_stage, 1),
        "zero_implementation": asked.zero_implementation if shared else "megatron_fsdp",
        "overlap_grad_reduce": asked.overlap_grad_reduce,
        "overlap_param_gather": asked.overlap_param_gather,
        "grad_reduce_in_fp32": asked.grad_reduce_in_fp32,
        "bucket_size": BUCKET if asked.overlap_grad_reduce and asked.zero_implementation != "fsdp2" else None,
        "pipeline_layers": stages if uneven else None,
    }


def _model(model: ModelConfig, asked: ParallelLayout, tensor_size: int, num_layers: int) -> dict[str, Any]:
    heads, groups = _heads(model, asked.tp, tensor_size)
    return model.model_dump(mode="json") | {
        "preset": None,
        "num_layers": num_layers,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": math.ceil(FFN / tensor_size) * tensor_size,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": 16 if heads <= 16 else 8,
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 1,
        "max_position_embeddings": 2 * SEQUENCE,
        "rope_scaling": None if model.rope_scaling is None else _rope_scaling(model.rope_scaling),
        "window_size": None if model.window_size is None else min(model.window_size, WINDOW),
        # At this width 0.02 leaves attention uniform and logits near 0: faults in either would hardly show.
        "init_method_std": 0.1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "kernels": "torch",
        "kernel_overrides": {},
    }


def _heads(model: ModelConfig, asked: int, tensor_size: int) -> tuple[int, int]:
    """Query heads and key/value heads: their ratio, and whether ranks share a key/value head, stay.

    Args:
        model: the whole model.
        asked: tensor-parallel size of the configuration.
        tensor_size: the one that is verified.
    """
    groups = model.query_groups
    shared_by = asked // groups if groups < asked else 1
    if shared_by > 1:
        few = max(1, tensor_size // shared_by)
    else:
        few = tensor_size * min(groups // asked, 2)
    if few % tensor_size and tensor_size % few:
        few = tensor_size
    return math.lcm(few * (model.num_attention_heads // groups), tensor_size), few


def _shrink_experts(model: dict[str, Any], asked: ParallelLayout, expert_size: int) -> None:
    """Fewer and narrower experts, as many of them on every expert-parallel rank; more than each token goes to."""
    experts = model.get("num_experts")
    if experts is None:
        return
    model["moe_router_topk"] = min(model["moe_router_topk"], 2)
    fewest = max(model["moe_router_topk"] + 1, expert_size * min(experts // asked.ep, 2))
    model["num_experts"] = min(experts, math.ceil(fewest / expert_size) * expert_size)
    if model["moe_ffn_hidden_size"] is not None:
        model["moe_ffn_hidden_size"] = model["ffn_hidden_size"]


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    values = scaling.model_dump(mode="json")
    if scaling.original_max_position_embeddings is not None:
        values["original_max_position_embeddings"] = ORIGINAL_POSITIONS
    return values


def _training(config: RunConfig, asked: ParallelLayout, sizes: dict[str, int], stages: list[int]) -> dict[str, Any]:
    """A short run with a rate at which weights move, over `stages` of so many layers in each chunk.

    adam_eps is above the rounding of a gradient (1e-2 * 2**-24): below it Adam makes a full step of whatever sign
    rounding gives to a gradient that should be 0, and one such weight moves all that comes after.
    """
    training = config.training
    micro_batches = training.global_batch_size // (training.micro_batch_size * asked.dp)
    if asked.vpp > 1 and sizes["pp"] > 1:
        micro_batches = sizes["pp"] * min(2, max(1, micro_batches // asked.pp))
    else:
        micro_batches = min(micro_batches, max(2, sizes["pp"] + 1))
    micro_batch_size = min(training.micro_batch_size, 2)
    row = 2 * sizes["tp"] * sizes["cp"]  # context parallelism gives every rank two chunks
    shared = math.gcd(*stages)  # core runs past the end of a chunk that recomputed pieces do not divide
    together = min(training.recompute_num_layers, shared)
    return {
        "training": {
            **training.model_dump(mode="json"),
            "train_steps": 4 * STEPS,
            "global_batch_size": micro_batches * micro_batch_size * sizes["dp"],
            "micro_batch_size": micro_batch_size,
            "seq_length": math.ceil(SEQUENCE / row) * row,
            "precision": "fp32",
            "recompute_num_layers": next(size for size in range(together, 0, -1) if shared % size == 0),
        },
        "optimizer": config.optimizer.model_dump(mode="json") | {"lr": 3e-3, "adam_eps": 1e-6},
        "schedule": {"kind": config.schedule.kind, "warmup_steps": 1, "wsd_decay_steps": None},
        "evaluation": {},
        "checkpoint": {},
        "guards": {},
        "logging": {},
        "profile": {},
    }


def _arithmetic_notes(config: RunConfig, devices: Devices) -> list[str]:
    return _gpu_notes(config, devices) if devices.gpus else _cpu_notes(config)


def _dropout_notes(config: RunConfig) -> list[str]:
    if not config.model.hidden_dropout and not config.model.attention_dropout:
        return []
    return ["dropout is off: what it drops is no property of the layout's arithmetic"]


def _overlaps_tensors(config: RunConfig, devices: Devices) -> bool:
    """Whether tensors are overlapped in what is compared: in bf16 alone, as which experts are not compared."""
    return devices.gpus and config.parallel.tp_comm_overlap and config.model.num_experts is None


def _gpu_notes(config: RunConfig, devices: Devices) -> list[str]:
    notes = []
    if config.training.precision == "fp8":
        notes.append("fp8 is compared as bf16: --against training.precision=bf16 compares fp8's losses")
    off = ["cuda_graphs"] if _overlaps_tensors(config, devices) else ["cuda_graphs", "tp_comm_overlap"]
    for name in off:
        if getattr(config.parallel, name):
            notes.append(f"parallel.{name} is off: what is compared is computed without it")
    return notes + _dropout_notes(config)


def _cpu_notes(config: RunConfig) -> list[str]:
    notes = []
    if config.training.precision != "fp32" and config.model.num_experts is not None:
        notes.append("compared as fp32 alone: a rounding of bf16 can send a token to another expert")
    elif config.training.precision == "fp8":
        notes.append("fp8 is compared as fp32 and as bf16: where a tensor is cut changes its FP8 scale")
    notes += _dropout_notes(config)
    if config.model.kernels == "transformer_engine":
        notes.append("computed by torch's kernels on the CPU in place of transformer_engine's")
    return notes
