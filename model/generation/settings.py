"""What is asked of generation, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

from foundation.errors import RequestError

COLDEST = 1e-6
"""The lowest temperature above 0: logits divided by less leave the range of fp32."""


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen.

    Filters apply in the order temperature, top_k, top_p, min_p, as in transformers. With top_k 0, top_p 1 and min_p 0
    tokens are drawn from softmax(logits / temperature) itself, which is what `log_probabilities` are of.

    Attributes:
        max_new_tokens: of a row, the token that stops it included.
        temperature: logits are divided by it, COLDEST or more; 0 takes the likeliest token.
        top_k: only the k likeliest; 0: all.
        top_p: only the likeliest that together reach this probability (Holtzman et al. 2019).
        min_p: only those with at least this share of the likeliest one's probability (arXiv 2407.01082).
        stop_ids: tokens that end a row; they stay in it.
        excluded_ids: tokens that have no probability, such as one that pads.
        seed: of the random streams, of which every token of every sample has its own.

    Raises:
        RequestError: a value outside its range, or a stop token that is excluded.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: frozenset[int] = frozenset()
    excluded_ids: frozenset[int] = frozenset()
    seed: int = 0

    def __post_init__(self) -> None:
        temperature_holds = self.temperature == 0 or COLDEST <= self.temperature < float("inf")
        for name, value, holds, rule, cure in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "is 1 or more", "64"),
            ("temperature", self.temperature, temperature_holds, f"is 0, or {COLDEST:g} or more", "1.0"),
            ("top_k", self.top_k, self.top_k >= 0, "is 0 (all) or more", "0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "is above 0 and at most 1", "1.0"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "is between 0 and 1", "0.0"),
            ("seed", self.seed, 0 <= self.seed < 2**64, "is between 0 and 2**64 - 1", "0"),
        ):
            if not holds:
                raise RequestError(f"{name} = {value} is refused", rule=f"{name} {rule}", cure=f"{name}={cure}")
        both = sorted(self.stop_ids & self.excluded_ids)
        if both:
            raise RequestError(
                f"tokens {both} stop a row and are excluded",
                rule="a row can end only by a token that it can draw: padding and end are different tokens",
                cure="a padding token of its own, or none",
            )

    @property
    def filtered(self) -> bool:
        """Whether tokens are drawn from another distribution than the one that log-probabilities are of."""
        return self.temperature == 0 or self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True)
class Prompt:
    """A row to continue.

    Attributes:
        sample_id: names the row's random streams; the same prompt with another id is drawn anew.
        tokens: one or more.
    """

    sample_id: int
    tokens: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
        tokens: new ones; the last is the stop token where `ended`.
        log_probabilities: fp32, of each token under softmax(logits / temperature) without excluded tokens and before
            top_k, top_p and min_p; at temperature 0 under softmax(logits).
        ended: by a stop token; else the length was at its limit.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...] = field(repr=False)
    ended: bool
