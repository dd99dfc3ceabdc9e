"""What real ranks hold, counted from their tensors. Imported by rank processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from launch.checks import check_sizes
from launch.config import load_config
from launch.planner.from_config import planned_bytes
from parallel.groups import ProcessGroups
from training.batch import DeviceBatch
from training.held_bytes import SavedActivations, held_bytes
from training.optimizer import apply_gradients, gradient_norm
from training.state import build_state
from training.step import BatchShape, run_batches

CONFIG = Path(__file__).parents[3] / "configs" / "tiny.yaml"
MODEL = (
    "model.num_layers=4",
    "model.hidden_size=128",
    "model.ffn_hidden_size=384",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.vocab_size=512",
    "training.seq_length=128",
    "training.micro_batch_size=2",
)


def settings(parallel: str, *more: str) -> list[str]:
    """`tp=2 pp=2` as overrides, sequence parallelism with tensor parallelism."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "dp": "data_parallel_size",
        "zero": "zero_stage",
    }
    sizes = dict(one.split("=") for one in parallel.split())
    given = [f"parallel.{names[name]}={size}" for name, size in sizes.items()]
    if int(sizes.get("tp", 1)) > 1:
        given.append("parallel.sequence_parallel=true")
    return [*MODEL, *given, *more]


def planned_and_held(overrides: list[str], rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    """(planned, held) bytes of this rank after one real step, by kind."""
    config = load_config(CONFIG, overrides)
    layout = check_sizes(config, world_size=world_size)
    training, vocab_size = config.training, config.model.vocab_size or 0
    count = training.global_batch_size // (training.micro_batch_size * layout.dp)
    with ProcessGroups(layout, training.seed):
        state = build_state(config.model, layout, training, config.optimizer, vocab_size)
        counter = SavedActivations(state)
        shape = BatchShape(count, training.micro_batch_size, training.seq_length)
        with counter.counted():
            run_batches(state.wrapped, [_batches(config, count, layout.cp) for _ in state.wrapped], shape,
                        forward_only=False)  # fmt: skip
        gradients = held_bytes(state).gradients
        apply_gradients(state.optimizer, gradient_norm(state.optimizer), config.optimizer.clip_grad)
        held = {**asdict(held_bytes(state)), "gradients": gradients, "activations": counter.most}
        if counter.now:
            raise AssertionError(f"{counter.now} bytes of activations are kept beyond the step")
    planned = asdict(planned_bytes(config, layout, vocab_size, layout.coordinates(rank).pp, count))
    return {name: (planned[name], float(held[name])) for name in planned}


def of_this_rank(overrides: list[str]) -> dict[str, tuple[float, float]]:
    """`planned_and_held` of the rank that runs it."""
    import torch.distributed as dist

    return planned_and_held(overrides, dist.get_rank(), dist.get_world_size())


def _batches(config: Any, count: int, context_ranks: int) -> Iterator[DeviceBatch]:
    rows, length = config.training.micro_batch_size, config.training.seq_length // context_ranks
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        tokens = torch.randint(0, config.model.vocab_size, (rows, length), generator=generator)
        yield DeviceBatch(tokens, tokens, torch.ones(rows, length), None, None, number)
