"""Run a model over rows without learning: log-probabilities of answers, scores, at any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray

from alignment.pairs import OverPairs, PairRows, answer_log_probabilities, last_scores
from data.preferences import PairBatch, PairBatches, PreferencePair
from parallel.groups import is_last_pipeline_stage, sum_over_batch_and_show_all_stages
from parallel.layout import ParallelLayout
from parallel.platform import current_platform
from training.batch import DeviceBatch
from training.objective import run_stage

RowValues = Callable[[torch.Tensor, Any], torch.Tensor]
"""(what the last stage gives, the micro-batch) -> [rows] a value for each row."""


def row_values(chunks: Sequence[Any], batches: Sequence[DeviceBatch], values: RowValues) -> list[torch.Tensor]:
    """A value for each row of this replica's `batches`, on its last stage; other stages get nothing. Collective.

    Args:
        chunks: of this rank, wrapped or not; they are put into evaluation and back.
        batches: of equal shapes, each asked for when it runs; as many on every replica, and with virtual stages a
            multiple of the stages.
    """
    tokens = batches[0].tokens
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()

    def forward(source: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        batch = next(source)

        def kept(output: torch.Tensor, **_core: bool) -> torch.Tensor:
            return values(output, batch)

        return run_stage(chunk, batch), kept

    sources = [iter(batches) for _ in chunks]
    with torch.no_grad(), current_platform().device_rng():
        found: list[torch.Tensor] = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=sources if len(chunks) > 1 else sources[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    for chunk, was in zip(chunks, training, strict=True):
        chunk.train(was)
    return found


def values_of_pairs(
    chunks: Sequence[Any],
    layout: ParallelLayout,
    pairs: Sequence[PreferencePair],
    seq_length: int,
    micro_batch_size: int,
    values: RowValues,
) -> NDArray[np.float64]:
    """[pairs, 2] a value for the chosen and the rejected answer of each pair, on every rank. Collective.

    Args:
        micro_batch_size: pairs in one forward pass.
    """
    device = torch.device(torch.cuda.current_device())
    collate = PairBatches(pairs, seq_length, seed=0, padding_id=0).collate
    together = micro_batch_size * layout.dp * layout.pp
    padded = [*range(len(pairs)), *[0] * (-len(pairs) % together)]
    rank = parallel_state.get_data_parallel_rank()
    own = [padded[first : first + micro_batch_size] for first in range(0, len(padded), micro_batch_size)]
    own = own[rank :: layout.dp]
    found = row_values(chunks, _PairRows(own, pairs, collate, device), values)
    whole = torch.zeros((len(padded), 2), dtype=torch.float64, device=device)
    if is_last_pipeline_stage():
        places = torch.arange(len(padded), device=device).view(-1, micro_batch_size)[rank :: layout.dp]
        for place, of_rows in zip(places, found, strict=True):
            whole[place] = of_rows.double().view(2, -1).t()
    sum_over_batch_and_show_all_stages(whole)
    return whole[: len(pairs)].cpu().numpy()


class _PairRows(Sequence[PairRows]):
    """Groups of pairs on the device, each while it is used: a whole set need not fit there."""

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        pairs: Sequence[PreferencePair],
        collate: Callable[[Sequence[PreferencePair]], PairBatch],
        device: torch.device,
    ) -> None:
        self._groups, self._pairs, self._collate, self._device = groups, pairs, collate, device

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int) -> PairRows:  # type: ignore[override]  # only ever one
        batch = self._collate([self._pairs[pair] for pair in self._groups[number]])
        return OverPairs().to_device(batch, self._device, 0, 1)


def answers(token_losses: torch.Tensor, batch: PairRows) -> torch.Tensor:
    """`RowValues`: the log-probability of each answer, from a model of tokens."""
    return answer_log_probabilities(token_losses, batch.loss_mask)


def scores(output: torch.Tensor, batch: PairRows) -> torch.Tensor:
    """`RowValues`: the score at each row's last token, from a model with a score head."""
    return last_scores(output, batch.last)
