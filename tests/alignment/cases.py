"""What the alignment tests run on ranks: learning on the enumerable task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

from alignment.pairs import BradleyTerry, DirectPreference, PairsWithReference
from alignment.scoring import answers, row_values, scores, values_of_pairs
from data.instruction import Example
from data.packing import PackedExamples, lay_out, stack
from data.preferences import PairBatches, PreferencePair
from model.config import ModelConfig
from model.decoder import Decoder
from model.global_tensors import global_slices
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.alignment import task
from tests.model.generation.cases import decoder_on
from training.batch import numbered
from training.config import TrainingSections
from training.objective import BatchSource, NextToken, Objective
from training.optimizer import apply_gradients, gradient_norm, set_learning_rate
from training.state import TrainingState, build_state
from training.step import BatchLoss, run_batches
from training.whole_model import WholeTensors, whole_gradients, whole_weights

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "max_position_embeddings": 16,
    "init_method_std": 0.05,
    "make_vocab_size_divisible_by": 1,
    "kernels": "torch",
}
SIZE = 8  # of rows: what an answer does not fill is padded


def sections(batch: int, micro: int, lr: float) -> TrainingSections:
    return TrainingSections.model_validate(
        {
            "training": {
                "train_steps": 100,
                "global_batch_size": batch,
                "micro_batch_size": micro,
                "seq_length": SIZE,
            },
            "optimizer": {"lr": lr, "weight_decay": 0.0, "adam_beta2": 0.999, "adam_eps": 1e-8},
        }
    )


def state_of(
    grid: ParallelLayout, weights: WholeTensors | None, head: Any, told: TrainingSections, **fields: Any
) -> TrainingState:
    """A model of the task; from `weights` where they are given, whose names it may lack or have more of."""

    @torch.no_grad()
    def load(chunks: list[Decoder]) -> None:
        for part in global_slices(list(chunks)):
            if weights is not None and part.name in weights:
                whole = weights[part.name]
                part.tensor.copy_(whole[part.index])

    model = ModelConfig.model_validate(MODEL | fields)
    return build_state(
        model,
        grid,
        told.training,
        told.optimizer,
        task.VOCAB_SIZE,
        prepare=load,
        head=head,
        excluded_tokens=frozenset({task.PAD}),
    )


def learn(
    state: TrainingState,
    source: BatchSource,
    objective: Objective,
    told: TrainingSections,
    steps: int,
    seen: Callable[[int], None] = lambda _: None,
) -> list[BatchLoss]:
    """Plain steps with a rate that falls to 0."""
    training, grid = told.training, state.layout
    rank, device, losses = parallel_state.get_data_parallel_rank(), torch.device(torch.cuda.current_device()), []
    per_step = training.global_batch_size // training.micro_batch_size
    for step in range(steps):
        host = source.micro_batches(step, training.global_batch_size, training.micro_batch_size, rank, grid.dp)
        moved = [objective.to_device(batch, device, 0, 1) for batch in host]
        batches = list(numbered(moved, step, per_step, rank, grid.dp))
        for chunk in state.wrapped:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        set_learning_rate(state.optimizer, told.optimizer.lr * (1 - step / steps), 0.0)
        shape = objective.shape(len(batches), training.micro_batch_size, training.seq_length)
        sources = [iter(batches) for _ in state.wrapped]
        losses.append(run_batches(state.wrapped, sources, shape, forward_only=False, objective=objective))
        seen(step)
        apply_gradients(state.optimizer, gradient_norm(state.optimizer), told.optimizer.clip_grad)
    return losses


def log_policy(state: TrainingState, asked: Sequence[task.Answer]) -> NDArray[np.float64]:
    """[prompts, answers]"""
    rows = task.every_row(asked)
    found = values_of_pairs(state.wrapped, state.layout, rows, SIZE, 256, answers)
    return found.reshape(-1)[: len(asked) * len(task.all_answers())].reshape(len(asked), -1)


def learn_reference(
    grid: ParallelLayout, asked: Sequence[task.Answer], steps: int
) -> tuple[WholeTensors | None, NDArray[np.float64]]:
    """Weights of the reference and its log-probabilities of all answers."""
    told = sections(batch=64, micro=64 // (2 * grid.dp), lr=3e-3)
    with ProcessGroups(grid, seed=0):
        state = state_of(grid, None, "tokens", told)
        examples = PackedExamples(task.noisy_copies(asked, 4096, 1), SIZE, 0, task.END)
        learn(state, examples, NextToken(packed=True), told, steps)
        return whole_weights(state), log_policy(state, asked)


def learn_reward(
    grid: ParallelLayout,
    weights: WholeTensors | None,
    pairs: list[PreferencePair],
    asked: Sequence[task.Answer],
    steps: int,
    batch: int = 128,
) -> tuple[list[float], NDArray[np.float64]]:
    """Losses, and scores of all answers to `asked` [prompts, answers]."""
    told = sections(batch, micro=batch // (2 * grid.dp), lr=2e-3)
    with ProcessGroups(grid, seed=0):
        state = state_of(grid, weights, "score", told)
        losses = learn(state, PairBatches(pairs, SIZE, 0, task.END), BradleyTerry(), told, steps)
        found = values_of_pairs(state.wrapped, grid, task.every_row(asked), SIZE, 256, scores)
    return [loss.mean for loss in losses], found.reshape(-1)[: len(asked) * 1555].reshape(len(asked), -1)


def learn_preferences(
    grid: ParallelLayout,
    weights: WholeTensors | None,
    pairs: list[PreferencePair],
    asked: Sequence[task.Answer],
    beta: float,
    steps: int,
    batch: int = 128,
) -> tuple[list[float], NDArray[np.float64]]:
    """DPO: losses, and log-probabilities of all answers to `asked` [prompts, answers]."""
    told = sections(batch, micro=batch // (2 * grid.dp), lr=1e-3)
    with ProcessGroups(grid, seed=0):
        state = state_of(grid, weights, "tokens", told)
        reference = values_of_pairs(state.wrapped, grid, pairs, SIZE, 64, answers)
        source = PairsWithReference(PairBatches(pairs, SIZE, 0, task.END), pairs, reference)
        losses = learn(state, source, DirectPreference(beta), told, steps)
        return [loss.mean for loss in losses], log_policy(state, asked)


def first_step(
    grid: ParallelLayout, weights: WholeTensors | None, pairs: list[PreferencePair], what: str, micro: int = 4
) -> tuple[float, dict[str, float], WholeTensors | None]:
    """Loss, further means and every gradient of one step of a reward model, DPO, or SFT on the chosen answers.

    Args:
        micro: pairs (rows for SFT) of all replicas together in a micro-batch.
    """
    told = sections(batch=16, micro=micro // grid.dp, lr=1e-3)
    gradients: list[WholeTensors | None] = []
    with ProcessGroups(grid, seed=0):
        state = state_of(grid, weights, "score" if what == "reward" else "tokens", told, num_layers=4)
        source, objective = _learned(what, pairs)
        loss = learn(state, source, objective, told, 1, lambda _: gradients.append(whole_gradients(state)))[0]
    return loss.mean, dict(loss.further), gradients[0]


def _learned(what: str, pairs: list[PreferencePair]) -> tuple[BatchSource, Objective]:
    if what == "sft":
        examples = PackedExamples([pair.chosen for pair in pairs], SIZE, 0, task.END, packed=False)
        return examples, NextToken(packed=True)
    batches = PairBatches(pairs, SIZE, 0, task.END)
    if what == "reward":
        return batches, BradleyTerry()
    reference = np.random.default_rng(0).normal(-8.0, 1.0, (len(pairs), 2))
    return PairsWithReference(batches, pairs, reference), DirectPreference(0.3, 0.1)


def answer_rows(
    grid: ParallelLayout, weights: WholeTensors, model: ModelConfig, rows: list[Example], width: int, micro: int
) -> NDArray[np.float64]:
    """Log-probability of each row's answer, two rows a pair, padded on the right to `width`, `micro` pairs together."""
    pairs = [PreferencePair(*two) for two in zip(rows[::2], rows[1::2], strict=True)]
    with decoder_on(weights, model, grid) as decoder:
        return values_of_pairs([decoder], grid, pairs, width, micro, answers).reshape(-1)


def packed_rows(
    grid: ParallelLayout, weights: WholeTensors, model: ModelConfig, rows: list[Example], width: int
) -> NDArray[np.float64] | None:
    """The same with all rows in one of `width` tokens, on the last stage."""
    row = stack([lay_out(rows, width, 0)])
    batch = NextToken(packed=True).to_device(row, torch.device(torch.cuda.current_device()), 0, 1)
    lengths = list(row.document_lengths or ())

    def of_documents(token_losses: torch.Tensor, batch: Any) -> torch.Tensor:
        return torch.stack([-part.sum() for part in (token_losses * batch.loss_mask)[0].split(lengths)])

    with decoder_on(weights, model, grid) as decoder:
        found = row_values([decoder], [batch], of_documents)
        return found[0][: len(rows)].double().numpy() if found else None
