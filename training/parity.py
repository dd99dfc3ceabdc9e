"""Whether a layout computes what one rank computes: losses, every gradient, weights after some steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from data.batches import MicroBatch
from model.config import ModelConfig
from model.decoder import Decoder
from model.initialization import disturb_vectors
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from training.batch import DeviceBatch, numbered, to_device
from training.config import TrainingSections
from training.optimizer import apply_gradients, gradient_norm, set_learning_rate
from training.schedule import learning_rate
from training.state import TrainingState, build_state
from training.step import BatchShape, run_batches
from training.whole_model import WholeTensors, whole_gradients, whole_weights

StepBatches = Callable[[int, int, int], Iterator[MicroBatch]]
"""(step from 0, data-parallel rank, data-parallel size) -> the micro-batches of that rank."""


@dataclass(frozen=True)
class ParityRecord:
    """What a run computed, without any trace of its layout.

    Attributes:
        losses, gradient_norms: of each step.
        gradients: of the first step, by global name, unclipped.
        weights: after the last step.
    """

    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    gradients: WholeTensors
    weights: WholeTensors


@dataclass(frozen=True)
class Difference:
    """How far apart two runs computed a quantity.

    Attributes:
        kind: "loss", "gradient norm", "gradient" or "weight".
        name: which: "step 2", or the parameter's global name.
        relative: the difference, relative to the reference.
        bound: what it may be.
    """

    kind: str
    name: str
    relative: float
    bound: float

    @property
    def quantity(self) -> str:
        return f"{self.kind} of {self.name}"

    @property
    def within(self) -> bool:
        return self.relative <= self.bound


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences: |a - b| / |a| of losses and norms; norms of tensors.

    The defaults hold in fp32, where the two runs differ by the order of additions alone.
    """

    loss: float = 1e-5
    gradient: float = 1e-5
    weight: float = 5e-5
    """Also of gradient norms, which from the second step on come from weights that are apart themselves."""


def record_run(
    model: ModelConfig,
    layout: ParallelLayout,
    sections: TrainingSections,
    vocab_size: int,
    batches: StepBatches,
    steps: int,
    prepare: Callable[[list[Decoder]], None] | None = None,
) -> ParityRecord | None:
    """Train `steps` steps at `layout` and collect what came out, on rank 0; None on the others.

    torch.distributed has to be initialised with `layout.world_size` ranks.

    Args:
        model, layout, sections, vocab_size: of the run; `layout` may be any.
        batches: what each data-parallel rank reads; together the same at every layout.
        steps: 1 or more.
        prepare: changes the initial weights. None: norms and biases leave 1 and 0 (`disturb_vectors`).
    """
    with ProcessGroups(layout, sections.training.seed):
        state = build_state(
            model, layout, sections.training, sections.optimizer, vocab_size, prepare=prepare or _disturb
        )
        losses, norms, gradients = [], [], None
        for step in range(steps):
            rate = learning_rate(step, sections)
            loss, norm, whole = _step(state, sections, batches, step, rate)
            losses.append(loss)
            norms.append(norm)
            gradients = whole if step == 0 else gradients
        weights = whole_weights(state)
    if gradients is None or weights is None:
        return None
    return ParityRecord(tuple(losses), tuple(norms), gradients, weights)


def _disturb(chunks: list[Decoder]) -> None:
    disturb_vectors(list(chunks), seed=0)


def _step(
    state: TrainingState, sections: TrainingSections, batches: StepBatches, step: int, rate: float
) -> tuple[float, float, WholeTensors | None]:
    training, layout = sections.training, state.layout
    rank, context_rank = parallel_state.get_data_parallel_rank(), parallel_state.get_context_parallel_rank()
    device = torch.device(torch.cuda.current_device())
    on_device = (to_device(batch, device, context_rank, layout.cp) for batch in batches(step, rank, layout.dp))
    per_step = training.global_batch_size // training.micro_batch_size
    local: list[DeviceBatch] = list(numbered(on_device, step, per_step, rank, layout.dp))
    shape = BatchShape.of(
        len(local),
        training.micro_batch_size,
        training.seq_length,
        packed=local[0].packed_seq_params is not None,
    )
    for chunk in state.wrapped:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    set_learning_rate(state.optimizer, rate, sections.optimizer.weight_decay)
    loss = run_batches(state.wrapped, [iter(local) for _ in state.wrapped], shape, forward_only=False, dropout_seed=7)
    whole = whole_gradients(state) if step == 0 else None
    norm = gradient_norm(state.optimizer)
    apply_gradients(state.optimizer, norm, sections.optimizer.clip_grad)
    return loss.mean, norm, whole


def differences(reference: ParityRecord, other: ParityRecord, bounds: Bounds) -> list[Difference]:
    """Every quantity of both runs beside its bound, in the order in which a fault shows first."""
    found = [
        Difference(kind, f"step {step + 1}", _apart(first, second), bound)
        for kind, bound, pairs in (
            ("loss", bounds.loss, zip(reference.losses, other.losses, strict=True)),
            ("gradient norm", bounds.weight, zip(reference.gradient_norms, other.gradient_norms, strict=True)),
        )
        for step, (first, second) in enumerate(pairs)
    ]
    for kind, bound, first_tensors, second_tensors in (
        ("gradient", bounds.gradient, reference.gradients, other.gradients),
        ("weight", bounds.weight, reference.weights, other.weights),
    ):
        if first_tensors.keys() != second_tensors.keys():
            raise AssertionError(f"other parameters: {sorted(first_tensors.keys() ^ second_tensors.keys())}")
        found += [
            Difference(kind, name, _tensors_apart(tensor, second_tensors[name]), bound)
            for name, tensor in first_tensors.items()
        ]
    return found


def _apart(first: float, second: float) -> float:
    """Relative difference; infinite where either is not finite, so that NaN never counts as equal."""
    if first == second:
        return 0.0
    relative = abs(first - second) / abs(first) if first else math.inf
    return math.inf if math.isnan(relative) else relative


def _tensors_apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """|first - second| / |first| in fp64."""
    first, second = first.double(), second.double()
    if torch.equal(first, second):
        return 0.0
    size = float(first.norm())
    return _apart(size, size + float((first - second).norm()))
