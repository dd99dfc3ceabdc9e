"""One pipeline stage of a run at its real world size: built, run and described without memory or peers."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from parallel.platform import install

install()

import torch  # noqa: E402  (core must find the platform installed)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from torch._subclasses.fake_tensor import (  # noqa: E402
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from foundation.errors import WorkError  # noqa: E402
from launch.config import RunConfig  # noqa: E402
from model.core_config import Recompute, core_config  # noqa: E402
from model.decoder import build_decoder_chunks  # noqa: E402
from model.kernels.choice import TORCH  # noqa: E402
from model.parameter_rows import ChunkRows  # noqa: E402
from parallel.data_parallel import wrap_in_data_parallel  # noqa: E402
from parallel.fake_world import TensorsWithoutMemory, fake_world  # noqa: E402
from parallel.groups import ProcessGroups  # noqa: E402
from parallel.layout import ParallelLayout  # noqa: E402
from training.batch import DeviceBatch  # noqa: E402
from training.checkpoint.tensors import described_state  # noqa: E402
from training.held_bytes import SavedActivations, held_bytes  # noqa: E402
from training.optimizer import apply_gradients, build_optimizer, set_learning_rate  # noqa: E402
from training.state import TrainingState  # noqa: E402


@dataclass(frozen=True)
class StageReport:
    """What the first rank of a stage holds, in bytes."""

    stage: int
    rank: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """At most, of the micro-batches that were run."""

    micro_batches: int
    checkpoint_tensors: int


@dataclass(frozen=True)
class Refused:
    """What core did not accept."""

    stage: int
    phase: str
    kind: str
    message: str
    place: str


def rehearse_stage(config: RunConfig, layout: ParallelLayout, vocab_size: int, stage: int) -> StageReport | Refused:
    """Be the first rank of `stage`: groups, model, optimizer, micro-batches through core's schedule, a step, the
    description of a checkpoint.

    Returns:
        What is held; or what core refused, whatever it raised.
    """
    rank = stage * (layout.world_size // layout.pp)
    phase = ["starting process groups"]
    try:
        with fake_world(rank, layout.world_size), ProcessGroups(layout, config.training.seed), TensorsWithoutMemory():
            return _rehearse(config, layout, vocab_size, stage, rank, phase)
    except (DynamicOutputShapeException, DataDependentOutputException, UnsupportedOperatorException) as error:
        raise WorkError(
            f"stage {stage} cannot be rehearsed without data: {phase[0]} needs values ({error.func})",
            cure="orthant verify, which trains a smaller model of the same layout on real data",
        ) from error
    except Exception as error:  # noqa: BLE001  (whatever core raises is its refusal, told with its place)
        place = traceback.extract_tb(error.__traceback__)[-1]
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "megatron" in frame.filename]
        place = frames[-1] if frames else place
        where = f"{place.filename.rpartition('site-packages/')[2]}:{place.lineno}"
        return Refused(stage, phase[0], type(error).__name__, str(error), where)


def _rehearse(
    config: RunConfig, layout: ParallelLayout, vocab_size: int, stage: int, rank: int, phase: list[str]
) -> StageReport:
    phase[0] = "building the model"
    state = _build(config, layout, vocab_size, phase)
    phase[0] = "running a micro-batch forward and backward"
    counted = SavedActivations(state)
    with counted.counted():
        micro_batches = _run(config, layout, state)
    gradients = held_bytes(state).gradients
    phase[0] = "stepping the optimizer"
    set_learning_rate(state.optimizer, config.optimizer.lr, config.optimizer.weight_decay)
    state.optimizer.prepare_grads()
    apply_gradients(state.optimizer, 1.0, config.optimizer.clip_grad)
    phase[0] = "describing a checkpoint"
    described = described_state(state)
    held = replace(held_bytes(state), gradients=gradients)
    return StageReport(
        stage=stage,
        rank=rank,
        **asdict(held),
        activations=counted.most,
        micro_batches=micro_batches,
        checkpoint_tensors=sum(1 for _ in _tensors(described)),
    )


def _build(config: RunConfig, layout: ParallelLayout, vocab_size: int, phase: list[str]) -> TrainingState:
    training = config.training
    recompute = Recompute(training.recompute_granularity, training.recompute_num_layers)
    core = core_config(config.model, layout, "bf16" if training.precision == "fp8" else training.precision, TORCH,
                       recompute)  # fmt: skip
    if config.model.num_experts is not None:
        # Without data nothing says how many tokens each expert gets: each the same number, as if a capacity cut them.
        core.moe_expert_capacity_factor = 1.0
        core.moe_pad_expert_input_to_capacity = True
        core.moe_token_dispatcher_type = "alltoall"  # the other kind does not take a capacity
    chunks = build_decoder_chunks(config.model, core, layout, vocab_size, TORCH)
    rows = tuple(ChunkRows.of(chunk) for chunk in chunks) if layout.zero_stage else ()
    phase[0] = "wrapping it in data parallelism"
    wrapped = wrap_in_data_parallel(chunks, core, layout)
    phase[0] = "building the optimizer"
    return TrainingState(
        core=core,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=build_optimizer(config.optimizer, wrapped, core, layout),
        layout=layout,
        vocab_size=vocab_size,
        kernels=TORCH,
        rows=rows,
    )


def _run(config: RunConfig, layout: ParallelLayout, state: TrainingState) -> int:
    """The least that core's schedule runs: one micro-batch, or one round of an interleaved pipeline."""
    training = config.training
    count = layout.pp if layout.vpp > 1 else 1
    rows, length = training.micro_batch_size, training.seq_length
    if config.data.document_mask:
        rows, length = 1, rows * length
    batches = [_batches(rows, length // layout.cp, count) for _ in state.wrapped]
    get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=state.wrapped if len(state.wrapped) > 1 else state.wrapped[0],
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=rows,
        forward_only=False,
    )
    return count


def _batches(rows: int, length: int, count: int) -> Iterator[DeviceBatch]:
    for number in range(count):
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        yield DeviceBatch(tokens, tokens, torch.ones(rows, length), None, None, number)


def _forward_step(batches: Iterator[DeviceBatch], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(batches)
    output = chunk(tokens=batch.tokens, position_ids=None, labels=batch.labels, loss_mask=batch.loss_mask)

    def loss(token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, tokens = (token_losses * batch.loss_mask).sum(), batch.loss_mask.sum()
        return total, tokens.to(torch.int), torch.stack((total.detach().double(), tokens.double()))

    return output, loss


def _tensors(described: Any) -> Iterator[Any]:
    if isinstance(described, dict):
        for value in described.values():
            yield from _tensors(value)
    elif isinstance(described, list | tuple):
        for value in described:
            yield from _tensors(value)
    elif hasattr(described, "global_shape"):
        yield described
