"""What models make of answers, without learning: log-probabilities, values and scores, at any layout.

What a rank computes depends on the rows that run beside a row in the last bits. So groups and mini-batches are fixed by
the rows' numbers, and whoever computes them computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from alignment.ppo.objectives import log_probabilities, scaled
from alignment.ppo.rows import AnswerRows, Rollout, micro_batches, width_of
from alignment.scoring import row_values
from parallel.groups import is_last_pipeline_stage
from parallel.layout import ParallelLayout

Values = Callable[[torch.Tensor, AnswerRows], torch.Tensor]
"""(what the last stage gives, the micro-batch) -> [b, s] by place, or [b]."""


def policy_values(vocab_size: int, temperature: float) -> Values:
    """Log-probabilities of tokens that follow, 0 where none is of an answer."""

    def of(logits: torch.Tensor, batch: AnswerRows) -> torch.Tensor:
        here = batch.loss_mask > 0
        found = torch.zeros(here.shape, device=logits.device)
        found[here] = log_probabilities(scaled(logits[here], temperature), batch.targets[here], vocab_size)
        return found

    return of


def critic_values(values: torch.Tensor, _batch: AnswerRows) -> torch.Tensor:
    """`Values`: of the state before each token."""
    return values


def last_scores(values: torch.Tensor, batch: AnswerRows) -> torch.Tensor:
    """`Values`: a reward model's score, read at the last token of each row."""
    return values.gather(1, batch.last[:, None])[:, 0]


def group_values(
    chunks: Sequence[Any], layout: ParallelLayout, rollout: Rollout, micro_batch_size: int, values: Values
) -> torch.Tensor | None:
    """Values of one group, on the host of the last stage of the replica that computes it; collective over that.

    Stages send each other tensors of one shape: what a group lacks to whole micro-batches is filled up with its first
    row.

    Returns:
        [n, t] by answer, or [n] where `values` gives one a row.
    """
    device = torch.device(torch.cuda.current_device())
    size = min(micro_batch_size, len(rollout))
    rows = torch.nn.functional.pad(torch.arange(len(rollout)), (0, -len(rollout) % size))
    batches = micro_batches(rollout.take(rows), size, width_of(rollout, layout.tp), {}, device)
    found = row_values(chunks, batches, values)
    if not is_last_pipeline_stage():
        return None
    whole = torch.cat([part.float() for part in found])[: len(rollout)].cpu()
    return whole if whole.dim() == 1 else rollout.by_answer(whole)


def batch_values(
    chunks: Sequence[Any], layout: ParallelLayout, batches: Sequence[Rollout], micro_batch_size: int, values: Values
) -> list[torch.Tensor]:
    """Values of every row of mini-batches, each cut as `alignment.ppo.learner` cuts it; on every rank. Collective."""
    device, replica = torch.device(torch.cuda.current_device()), layout.coordinates(dist.get_rank()).dp
    own: list[tuple[int, int, torch.Tensor]] = []
    for number, rollout in enumerate(batches):
        width = width_of(rollout, layout.tp)
        parts = micro_batches(rollout, micro_batch_size, width, {}, device, replica, layout.dp)
        found = row_values(chunks, parts, values)
        if is_last_pipeline_stage() and layout.coordinates(dist.get_rank()).tp == 0:
            own += [(number, replica + place * layout.dp, one.float().cpu()) for place, one in enumerate(found)]
    everywhere = shared(own)
    whole = []
    for number, rollout in enumerate(batches):
        parts_in_order = sorted((place, one) for which, place, one in everywhere if which == number)
        whole.append(rollout.by_answer(torch.cat([one for _, one in parts_in_order])))
    return whole


def shared(own: list[Any]) -> list[Any]:
    """The lists of all ranks of this station, one after another. Collective."""
    if dist.get_world_size() == 1:
        return own
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return [one for part in everywhere for one in part]
