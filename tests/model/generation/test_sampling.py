"""The sampler beside softmax by a chi-square test, its filters beside transformers', its random streams."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from foundation.errors import RequestError
from model.generation.random_streams import uniforms
from model.generation.sampling import choose
from model.generation.settings import COLDEST, Prompt, SamplingSettings
from tests.model.generation.cases import built, generate_on, weights_of
from tests.ranks import RankPool
from tests.training.parity_cases import layout


def chi_square_tail(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """How likely counts this far from `probabilities` are (Wilson and Hilferty 1931); rare tokens taken together."""
    expected = probabilities * counts.sum()
    often = expected >= 10
    seen = torch.cat((counts[often], counts[~often].sum()[None]))
    wanted = torch.cat((expected[often], expected[~often].sum()[None]))
    statistic = float(((seen - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
    degrees = len(wanted) - 1
    spread = 2 / (9 * degrees)
    deviations = ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(deviations / math.sqrt(2))


@pytest.mark.parametrize("grid", [layout(), layout(tp=2), layout(tp=2, pp=2)], ids=["one", "tp2", "tp2_pp2"])
def test_tokens_follow_the_softmax(ranks: RankPool, grid: Any) -> None:
    model, reference = built("llama")
    prompt = (3, 14, 15, 92, 65)
    prompts = [Prompt(number, prompt) for number in range(6000)]
    settings = SamplingSettings(max_new_tokens=1, temperature=1.5, seed=11)
    found = ranks.run(grid.world_size, generate_on, weights_of(reference, model), model, grid, prompts, settings, 500)[
        0
    ]
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in found]), minlength=len(logits)).double()
    assert chi_square_tail(counts, torch.softmax(logits / 1.5, -1)) > 1e-3
    assert chi_square_tail(counts, torch.softmax(logits / 1.2, -1)) < 1e-3, "another temperature has to be seen"


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8, "min_p": 0.1}],
    ids=str,
)
def test_filters_are_transformers(fields: dict[str, Any]) -> None:
    from transformers.generation import logits_process as theirs

    settings = SamplingSettings(max_new_tokens=1, **fields)
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 2
    warped = logits / settings.temperature
    if settings.top_k:
        warped = theirs.TopKLogitsWarper(settings.top_k)(None, warped)
    if settings.top_p < 1:
        warped = theirs.TopPLogitsWarper(settings.top_p)(None, warped)
    if settings.min_p:
        warped = theirs.MinPLogitsWarper(settings.min_p)(None, warped)
    probability = torch.softmax(warped.double(), -1)
    draws = torch.linspace(0, 1, 4002, dtype=torch.float64)[:-1]
    for row in range(3):
        tokens, log_probabilities = choose(logits[row].expand(4001, 40), settings, draws)
        shares = torch.bincount(tokens, minlength=40) / 4001
        assert (shares - probability[row]).abs().max() < 1e-3
        unfiltered = torch.log_softmax(logits[row] / settings.temperature, -1)
        assert (log_probabilities - unfiltered[tokens]).abs().max() < 1e-6


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_tokens_that_can_be_drawn(draw: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    tokens, _ = choose(logits, SamplingSettings(max_new_tokens=1), torch.tensor([draw], dtype=torch.float64))
    assert int(tokens) == (1 if draw == 0 else 2)


def test_the_coldest_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([[-80.0, 79.0, 80.0]])
    tokens, log_probabilities = choose(logits, SamplingSettings(max_new_tokens=1, temperature=COLDEST), torch.zeros(1))
    assert tokens.tolist() == [2] and log_probabilities.tolist() == [0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_of_no_numbers_no_token_is_made(ranks: RankPool, temperature: float) -> None:
    model, reference = built("llama")
    weights = {name: torch.full_like(one, torch.nan) for name, one in weights_of(reference, model).items()}
    settings = SamplingSettings(max_new_tokens=2, temperature=temperature)
    with pytest.raises(Exception, match="not finite"):
        ranks.run(1, generate_on, weights, model, layout(), [Prompt(0, (1,))], settings)


def test_streams_are_philox() -> None:
    """numpy's own Philox is of 64-bit words; the words of this one are known from Random123's kat_vectors."""
    from model.generation.random_streams import _philox

    full, zero = np.array([0xFFFFFFFF], dtype=np.uint64), np.zeros(1, dtype=np.uint64)
    assert [int(word[0]) for word in _philox([zero] * 4, 0, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = _philox([full] * 4, 0xFFFFFFFF, 0xFFFFFFFF)
    assert [int(word[0]) for word in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_streams_are_uniform_and_apart() -> None:
    samples, tokens = np.meshgrid(np.arange(300), np.arange(300))
    drawn = uniforms(5, samples.ravel(), tokens.ravel())
    assert len(set(drawn.tolist())) == drawn.size
    counts = np.bincount((drawn * 100).astype(int), minlength=100)
    assert ((counts - 900) ** 2 / 900).sum() < 160  # 99 degrees of freedom: 1 in 10,000
    grid = drawn.reshape(300, 300) - 0.5
    assert abs((grid[1:] * grid[:-1]).mean()) < 1e-3 and abs((grid[:, 1:] * grid[:, :-1]).mean()) < 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e-7},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"max_new_tokens": 0},
        {"stop_ids": frozenset({3}), "excluded_ids": frozenset({3})},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        SamplingSettings(**{"max_new_tokens": 4} | fields)
