"""Choose tokens from logits: greedy, or by inverting the cumulative distribution at a given number."""

from __future__ import annotations

import torch

from model.generation.settings import SamplingSettings


def choose(logits: torch.Tensor, settings: SamplingSettings, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token a row.

    The token is the first whose cumulative probability is above the row's draw. Small differences of logits, as between
    layouts, move it only where a draw lies that near an edge.

    Args:
        logits: [n, vocabulary], whole rows; entries that only pad the vocabulary cut off.
        draws: [n] fp64 in [0, 1).

    Returns:
        Tokens [n] int64 and their log-probabilities [n] fp32 (see `Completion`).
    """
    scaled = logits.float()
    if settings.excluded_ids:
        excluded = torch.tensor(sorted(settings.excluded_ids), device=logits.device)
        scaled = scaled.index_fill(-1, excluded, -torch.inf)
    if settings.temperature not in (0.0, 1.0):
        scaled = scaled / settings.temperature
    log_probabilities = torch.log_softmax(scaled, dim=-1)
    if settings.temperature == 0:
        tokens = scaled.argmax(dim=-1)
    else:
        tokens = _invert(_filtered(log_probabilities, settings), draws)
    return tokens, log_probabilities.gather(-1, tokens[:, None])[:, 0]


def _invert(log_probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """[n]: first token whose cumulative probability is above its row's draw; rows need not be normalised."""
    cumulative = log_probabilities.double().exp().cumsum(dim=-1)
    wanted = draws.to(cumulative)[:, None] * cumulative[:, -1:]
    # Rounding up to the whole sum itself would point behind the last token.
    wanted = torch.minimum(wanted, torch.nextafter(cumulative[:, -1:], torch.zeros_like(wanted)))
    found = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    return found.clamp(max=cumulative.shape[-1] - 1)  # of what is no number the place is behind the last


def _filtered(log_probabilities: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """-inf for tokens that a filter leaves out; each filter sees what the one before left."""
    kept = log_probabilities
    if 0 < settings.top_k < kept.shape[-1]:
        least = kept.topk(settings.top_k, dim=-1).values[:, -1:]
        kept = kept.masked_fill(kept < least, -torch.inf)
    if settings.top_p < 1:
        probability, order = torch.softmax(kept.double(), dim=-1).sort(dim=-1, descending=True, stable=True)
        before = probability.cumsum(dim=-1) - probability
        left_out = torch.zeros_like(kept, dtype=torch.bool).scatter(-1, order, before >= settings.top_p)
        kept = kept.masked_fill(left_out, -torch.inf)
    if settings.min_p > 0:
        probability = torch.softmax(kept, dim=-1)
        kept = kept.masked_fill(probability < settings.min_p * probability.amax(dim=-1, keepdim=True), -torch.inf)
    return kept
