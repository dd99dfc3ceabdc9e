"""What of a training state goes into core's distributed checkpoint, and back.

Core's `torch_dist` stores whole tensors in pieces. Master weights and both moments are stored like the weights, under
the names of core's "fully_reshardable" form, so that any layout reads any other's.
"""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling

from foundation.errors import WorkError
from model.decoder import Decoder
from model.kernels.amax_state import is_extra_state, made_anew
from parallel.data_parallel import gather_updated_parameters
from parallel.replicated_optimizer_state import describe, load
from training.checkpoint.programs import look_through
from training.checkpoint.shards import describe_shards, load_shards
from training.checkpoint.writing import Plan
from training.state import TrainingState


def plan_tensors(state: TrainingState, folder: Path) -> Plan:
    """What each rank writes of weights and optimizer state into the empty `folder`. Collective."""
    gather_updated_parameters(state.wrapped, state.layout)
    # Core would start a manager process in every rank for what a rank hands to itself. Such a one outlives a rank
    # that is killed and keeps its output open, so that whoever reads that never sees the end.
    filesystem_async._results_queue = SimpleQueue()
    strategy = FullyParallelSaveStrategyWrapper(
        TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), _replicas()
    )
    described = described_state(state, is_loading=False)
    return Plan(dist_checkpointing.save(described, str(folder), strategy, async_sharded_save=True))


def read_tensors(state: TrainingState, folder: Path) -> None:
    """Read weights and optimizer state from `folder`, written at any layout. Collective.

    Raises:
        WorkError: it holds other tensors than this state has, or something that is not only data.
    """
    look_through(folder)
    loaded, left, lacking = dist_checkpointing.load(
        described_state(state, is_loading=True), str(folder), _reader(folder), strict=StrictHandling.RETURN_ALL
    )
    _refuse_other_tensors(folder, left, lacking)
    if not state.layout.fully_sharded:
        _load_chunks(list(state.chunks), loaded)
    if not state.layout.zero_stage:
        load(state.optimizer, loaded["optimizer"])
    else:
        load_shards(state, loaded)


def read_weights(chunks: list[Decoder], folder: Path, keep: frozenset[str] = frozenset()) -> None:
    """Read the weights alone from `folder`, for evaluation, generation and fine-tuning. Collective.

    Args:
        keep: names of parameters that stay as they are, such as a head that the checkpoint does not have.
    """
    look_through(folder)
    wanted = _described_chunks(chunks)
    for described in wanted.values():
        for name in [name for name in described if name in keep or is_extra_state(name)]:
            del described[name]
    loaded = dist_checkpointing.load(wanted, str(folder), _reader(folder), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    for index, chunk in enumerate(chunks):
        own = {name: value for name, value in chunk.state_dict().items() if name in keep}
        _load_chunk(chunk, loaded[_chunk_key(index, len(chunks))] | own)


def _refuse_other_tensors(folder: Path, left: set[str], lacking: set[str]) -> None:
    """Raise for tensors of the checkpoint that nobody asked for, and for ones that it lacks.

    What FP8 layers keep is of one library and one recipe: another begins without it.
    """
    left, lacking = ({name for name in names if not is_extra_state(name)} for names in (left, lacking))
    if not left and not lacking:
        return
    what = [f"lacks {_some(lacking)}"] if lacking else []
    what += [f"holds {_some(left)}, which this run has no place for"] if left else []
    raise WorkError(
        f"the checkpoint {' and '.join(what)}",
        where=str(folder),
        cure="resume with the model and optimizer that it was written with",
    )


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:5])
    return first if len(names) <= 5 else f"{first} and {len(names) - 5} more"


def _replicas() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": _replicas(),
    }


def _reader(folder: Path) -> Any:
    return FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), _replicas())


def _chunk_key(index: int, chunks: int) -> str:
    return "model" if chunks == 1 else f"model{index}"


def _described_chunks(chunks: list[Decoder]) -> dict[str, Any]:
    return {
        _chunk_key(index, len(chunks)): chunk.sharded_state_dict(metadata=_metadata())
        for index, chunk in enumerate(chunks)
    }


def described_state(state: TrainingState, *, is_loading: bool = False) -> dict[str, Any]:
    """Core's description of what a checkpoint of `state` holds: names, whole shapes, this rank's parts. Collective."""
    described = {} if state.layout.fully_sharded else _described_chunks(list(state.chunks))
    if not state.layout.zero_stage:
        weights = dict(described)  # by chunk: two chunks use the same local names
        return described | {"optimizer": describe(state.optimizer, weights)}
    return described | describe_shards(state, is_loading=is_loading)


def _load_chunks(chunks: list[Decoder], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        _load_chunk(chunk, loaded[_chunk_key(index, len(chunks))])


def _load_chunk(chunk: Decoder, loaded: dict[str, Any]) -> None:
    """Weights, and what FP8 layers keep: layers that keep nothing pass it over, new ones begin without it."""
    kept = {name: made_anew(loaded.get(name), chunk.config) for name in chunk.state_dict() if is_extra_state(name)}
    weights = {name: value for name, value in loaded.items() if not is_extra_state(name)}
    chunk.load_state_dict(weights | kept, strict=True)
