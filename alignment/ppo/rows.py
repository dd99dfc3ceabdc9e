"""Answers on their way: what was generated, and the same as batches of a model.

Two ways to lay out what belongs to an answer's tokens. By answer, [n, t]: t counts the answer's own tokens; so it
travels and is reckoned with. By place, [n, s]: where the model reads the token before, so a model's outputs lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.generation.settings import Completion
from training.batch import DeviceBatch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rollout:
    """n prompts with their answers, on the host. Masks follow from lengths alone: no token stands for padding.

    Attributes:
        tokens: [n, s] int64, prompt and answer, filled up on the right.
        prompt_lengths, answer_lengths: [n] int64; the answer's end counts.
        ended: [n] bool: by a stop token; else the length was at its limit.
        sampled: [n, t] fp32, log-probabilities under the policy that sampled; t is `max_new_tokens` of every answer.
        sample_ids: [n] int64, of the whole run: prompt, random stream and place in the batch follow from it.
        versions: [n] int64, updates of the weights that sampled.
    """

    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    answer_lengths: torch.Tensor
    ended: torch.Tensor
    sampled: torch.Tensor
    sample_ids: torch.Tensor
    versions: torch.Tensor

    @classmethod
    def of(cls, completions: Sequence[Completion], max_new_tokens: int, version: int) -> Rollout:
        """From what an engine gave, in its order."""
        rows = [[*one.prompt.tokens, *one.tokens] for one in completions]
        tokens = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
        sampled = torch.zeros((len(rows), max_new_tokens))
        for place, (row, one) in enumerate(zip(rows, completions, strict=True)):
            tokens[place, : len(row)] = torch.tensor(row)
            sampled[place, : len(one.tokens)] = torch.tensor(one.log_probabilities)
        return cls(
            tokens=tokens,
            prompt_lengths=torch.tensor([len(one.prompt.tokens) for one in completions]),
            answer_lengths=torch.tensor([len(one.tokens) for one in completions]),
            ended=torch.tensor([one.ended for one in completions]),
            sampled=sampled,
            sample_ids=torch.tensor([one.prompt.sample_id for one in completions]),
            versions=torch.full((len(rows),), version, dtype=torch.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[Rollout]) -> Rollout:
        """One after another."""
        width = max(part.tokens.shape[1] for part in parts)
        widened = [torch.nn.functional.pad(part.tokens, (0, width - part.tokens.shape[1])) for part in parts]
        others = {name: torch.cat([getattr(part, name) for part in parts]) for name in NAMES if name != "tokens"}
        return cls(tokens=torch.cat(widened), **others)

    def take(self, rows: torch.Tensor) -> Rollout:
        """Some rows [m] int64, in that order."""
        return Rollout(**{name: getattr(self, name)[rows] for name in NAMES})

    def tensors(self) -> Tensors:
        """By name, to be sent or kept."""
        return {name: getattr(self, name) for name in NAMES}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mask(self) -> torch.Tensor:
        """[n, t] bool, by answer: what is a token."""
        return torch.arange(self.sampled.shape[1]) < self.answer_lengths[:, None]

    @property
    def lengths(self) -> torch.Tensor:
        """[n] int64, of whole rows."""
        return self.prompt_lengths + self.answer_lengths

    def places(self) -> torch.Tensor:
        """[n, t] int64: where the model reads the token before each of the answer; beyond the answer, its last one."""
        steps = torch.minimum(torch.arange(self.sampled.shape[1]), self.answer_lengths[:, None] - 1)
        return self.prompt_lengths[:, None] - 1 + steps

    def by_place(self, values: torch.Tensor, width: int) -> torch.Tensor:
        """[n, t] by answer -> [n, width] by place; 0 elsewhere."""
        laid = values.new_zeros((len(self), width))
        rows, steps = self.mask.nonzero(as_tuple=True)
        laid[rows, self.places()[rows, steps]] = values[rows, steps]
        return laid

    def by_answer(self, values: torch.Tensor) -> torch.Tensor:
        """[n, s] by place -> [n, t] by answer; 0 beyond it."""
        found = values.gather(1, self.places())
        return torch.where(self.mask, found, torch.zeros_like(found))


NAMES = tuple(Rollout.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class AnswerRows(DeviceBatch):
    """A micro-batch. `loss_mask` is 1 where the token that follows is one of the answer; there are no `labels`: the
    last stage gives logits.

    Attributes:
        targets: [b, s] int64, the token that follows.
        last: [b] int64, place of each row's last token.
        given: [b, s] fp32 each, by place.
    """

    targets: torch.Tensor
    last: torch.Tensor
    given: Mapping[str, torch.Tensor]


def width_of(rollout: Rollout, multiple: int) -> int:
    """Places that hold all rows, a multiple of what cuts sequences."""
    longest = int(rollout.lengths.max())
    return -(-longest // multiple) * multiple


def answer_rows(rollout: Rollout, width: int, given: Tensors, device: torch.device) -> AnswerRows:
    """A micro-batch of all rows, `width` places wide.

    Args:
        given: [n, t] each, by answer.
    """
    tokens = torch.nn.functional.pad(rollout.tokens, (0, width + 1 - rollout.tokens.shape[1]))  # below 0 it cuts
    ones = torch.ones(rollout.sampled.shape)
    return AnswerRows(
        tokens=tokens[:, :width].contiguous().to(device),
        labels=None,  # type: ignore[arg-type]  # logits are wanted
        loss_mask=rollout.by_place(ones, width).to(device),
        position_ids=None,
        packed_seq_params=None,
        targets=tokens[:, 1:].contiguous().to(device),
        last=(rollout.lengths - 1).to(device),
        given={name: rollout.by_place(values, width).to(device) for name, values in given.items()},
    )


def micro_batches(
    rollout: Rollout, size: int, width: int, given: Tensors, device: torch.device, rank: int = 0, ranks: int = 1
) -> list[AnswerRows]:
    """Every `ranks`th micro-batch of `size` rows, from number `rank` on."""
    found = []
    for rows in torch.arange(len(rollout)).split(size)[rank::ranks]:
        part = {name: values[rows] for name, values in given.items()}
        found.append(answer_rows(rollout.take(rows), width, part, device))
    return found
