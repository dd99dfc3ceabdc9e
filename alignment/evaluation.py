"""How likely a model finds given texts: perplexity, and answers to choose from. At any tensor x pipeline layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from alignment.scoring import row_values
from model.decoder import Decoder
from model.kernels.cross_entropy import vocab_parallel_cross_entropy
from parallel.groups import is_last_pipeline_stage, sum_over_batch_and_show_all_stages
from training.batch import DeviceBatch

ROWS, TOKENS = 16, 8192
"""Rows and tokens in one forward pass at most (one row at least): logits of all of them are held at once."""


class Continuation(NamedTuple):
    """Tokens whose probability is asked for, after others."""

    context: Sequence[int]
    """One token or more."""
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """What a model makes of a continuation."""

    log_probability: float
    is_greedy: bool
    """Whether each of its tokens is the likeliest."""


@dataclass(frozen=True)
class _Rows(DeviceBatch):
    """`targets` [b, s] int64 in place of labels: the stage gives logits."""

    targets: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class TokenScorer:
    """Scores continuations with one replica of a model. Collective over it.

    Attributes:
        decoder: this rank's stage.
        context_length: tokens that the model sees; of a longer context the end is kept.
        progress: is told (continuations scored, in all) after every pass.
    """

    decoder: Decoder
    context_length: int
    progress: Callable[[int, int], None] = lambda _done, _total: None

    def score(self, asked: Sequence[Continuation]) -> list[Likelihood]:
        """In the order of `asked`; on every rank.

        Raises:
            ValueError: a continuation without a token, without a context, or longer than the model sees.
        """
        if any(not one.context or not 1 <= len(one.tokens) <= self.context_length for one in asked):
            raise ValueError("a continuation has a context and at most as many tokens as the model sees")
        values = torch.zeros((len(asked), 2), dtype=torch.float64, device=torch.cuda.current_device())
        # Rows of about one length run together.
        order = sorted(range(len(asked)), key=lambda number: -len(asked[number].context) - len(asked[number].tokens))
        while order:
            longest = min(self.context_length, len(asked[order[0]].context) + len(asked[order[0]].tokens))
            rows = max(1, min(ROWS, TOKENS // longest))
            numbers, order = order[:rows], order[rows:]
            batch = self._batch([asked[number] for number in numbers])
            found = row_values([self.decoder], [batch], self._likelihoods)
            if is_last_pipeline_stage():
                values[numbers] = found[0]
            self.progress(len(asked) - len(order), len(asked))
        sum_over_batch_and_show_all_stages(values)
        return [Likelihood(total, bool(greedy)) for total, greedy in values.tolist()]

    def _batch(self, asked: Sequence[Continuation]) -> _Rows:
        device = torch.device(torch.cuda.current_device())
        rows = [[*one.context, *one.tokens][-self.context_length - 1 :] for one in asked]
        config = self.decoder.config
        cut = config.tensor_model_parallel_size if config.sequence_parallel else 1
        width = -(-(max(len(row) for row in rows) - 1) // cut) * cut
        tokens = torch.zeros((len(rows), width), dtype=torch.int64)
        targets, counted = tokens.clone(), torch.zeros((len(rows), width))
        for place, (row, one) in enumerate(zip(rows, asked, strict=True)):
            inputs = len(row) - 1
            tokens[place, :inputs], targets[place, :inputs] = torch.tensor(row[:-1]), torch.tensor(row[1:])
            counted[place, inputs - len(one.tokens) : inputs] = 1.0
        return _Rows(
            tokens=tokens.to(device),
            labels=None,  # type: ignore[arg-type]  # logits are wanted
            loss_mask=counted.to(device),
            position_ids=None,
            packed_seq_params=None,
            targets=targets.to(device),
        )

    def _likelihoods(self, logits: torch.Tensor, batch: _Rows) -> torch.Tensor:
        """[b, s, width of this rank] -> [b, 2] fp64: log-probability, and whether all tokens are the likeliest."""
        group, width = self.decoder.pg_collection.tp, logits.shape[-1]
        losses = vocab_parallel_cross_entropy(logits, batch.targets, self.decoder.vocab_size, group)
        first = group.rank() * width
        own = logits[..., : max(0, min(width, self.decoder.vocab_size - first))]
        nowhere = torch.full(batch.targets.shape, -torch.inf, device=logits.device)
        likeliest = own.amax(dim=-1).float() if own.shape[-1] else nowhere
        here = (batch.targets >= first) & (batch.targets < first + own.shape[-1])
        columns = (batch.targets - first).clamp(0, max(0, own.shape[-1] - 1))
        wanted = nowhere
        if own.shape[-1]:
            wanted = torch.where(here, own.gather(-1, columns[..., None])[..., 0].float(), nowhere)
        both = torch.stack((likeliest, wanted))
        if group.size() > 1:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        counts = batch.loss_mask > 0
        greedy = ((both[1] >= both[0]) | ~counts).all(dim=1)
        total = -(losses.double() * counts).sum(dim=1)
        return torch.stack((total, greedy.double()), dim=1)


def windows(tokens: Sequence[int], before: int, length: int) -> list[Continuation]:
    """A document as continuations that each predict up to `length` tokens, every token once.

    Args:
        before: the token that stands before a document, e.g. that which ends one.
    """
    whole = [before, *tokens]
    return [Continuation(whole[at : at + 1], whole[at + 1 : at + 1 + length]) for at in range(0, len(tokens), length)]


@dataclass(frozen=True)
class Perplexity:
    """Of a model on documents.

    Attributes:
        nats_per_token, perplexity: the second is exp of the first.
        bits_per_byte: of UTF-8 text; comparable between tokenizers.
    """

    documents: int
    tokens: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float


def perplexity(scorer: TokenScorer, documents: Iterable[tuple[Sequence[int], int]], before: int) -> Perplexity:
    """Over (tokens, bytes) of each document. Collective."""
    asked, count, tokens, size = [], 0, 0, 0
    for document, length in documents:
        asked += windows(document, before, scorer.context_length)
        count, tokens, size = count + 1, tokens + len(document), size + length
    nats = -sum(one.log_probability for one in scorer.score(asked))
    each = nats / max(1, tokens)
    return Perplexity(count, tokens, each, math.exp(min(each, 700.0)), nats / math.log(2) / max(1, size))
