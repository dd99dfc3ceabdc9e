"""Generation with a cache, beside transformers' and beside itself at other layouts."""

from __future__ import annotations

import pytest
import torch

from foundation.errors import RequestError
from model.generation.engine import refuse_layout
from model.generation.settings import Completion, Prompt, SamplingSettings
from tests.model.generation.cases import (
    CONTEXT,
    LAYOUTS,
    MODELS,
    built,
    generate_on,
    greedy_by_transformers,
    log_probabilities_by_transformers,
    some_prompts,
    weights_of,
)
from tests.ranks import RankPool
from tests.training.parity_cases import VOCAB_SIZE, layout

GREEDY = SamplingSettings(max_new_tokens=64, temperature=0.0)


def completions(
    ranks: RankPool,
    family: str,
    where: str,
    prompts: list[Prompt],
    settings: SamplingSettings,
    group_size: int = 16,
) -> list[Completion]:
    """What all ranks agree on."""
    model, reference = built(family)
    grid = LAYOUTS[where]
    of_ranks = ranks.run(
        grid.world_size, generate_on, weights_of(reference, model), model, grid, prompts, settings, group_size
    )
    assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
    return of_ranks[0]


@pytest.mark.parametrize("where", ["one", "tp2", "pp2", "tp2_pp2"])
def test_greedy_tokens_equal_transformers(ranks: RankPool, where: str) -> None:
    prompts = some_prompts(50)
    found = completions(ranks, "llama", where, prompts, GREEDY)
    assert [completion.tokens for completion in found] == greedy_by_transformers(built("llama")[1], prompts, 64)


@pytest.mark.parametrize("family", [family for family in MODELS if family != "llama"])
@pytest.mark.parametrize("where", ["one", "tp2_sp_pp2"])
def test_every_family_does(ranks: RankPool, family: str, where: str) -> None:
    prompts, settings = some_prompts(12), SamplingSettings(max_new_tokens=12, temperature=0.0)
    found = completions(ranks, family, where, prompts, settings, group_size=5)
    assert [completion.tokens for completion in found] == greedy_by_transformers(built(family)[1], prompts, 12)


@pytest.mark.parametrize(
    ("where", "temperature"),
    [("one", 0.5), ("one", 1.0), ("one", 2.0), ("tp2", 1.0), ("pp2", 1.0), ("tp2_pp2", 1.0), ("tp2_sp_pp2", 0.5)],
)
def test_log_probabilities_equal_transformers(ranks: RankPool, where: str, temperature: float) -> None:
    settings = SamplingSettings(max_new_tokens=16, temperature=temperature, stop_ids=frozenset({3, 4}))
    found = completions(ranks, "llama", where, some_prompts(20), settings)
    reference = built("llama")[1]
    for completion in found:
        theirs = log_probabilities_by_transformers(reference, completion, temperature)
        assert (torch.tensor(completion.log_probabilities) - theirs).abs().max() < 1e-5


def test_the_same_tokens_at_every_layout(ranks: RankPool) -> None:
    settings = SamplingSettings(max_new_tokens=12, temperature=1.0, seed=7)
    found = {where: completions(ranks, "llama", where, some_prompts(16), settings, 8) for where in LAYOUTS}
    for others in found.values():
        for one, other in zip(found["one"], others, strict=True):
            # A draw within 1e-5 of an edge may fall to its other side; none of these does.
            assert one.tokens == other.tokens
            gap = torch.tensor(one.log_probabilities) - torch.tensor(other.log_probabilities)
            assert gap.abs().max() < 1e-5


def test_a_row_does_not_depend_on_others(ranks: RankPool) -> None:
    prompts = some_prompts(12)
    settings = SamplingSettings(max_new_tokens=24, stop_ids=frozenset(range(8)))
    together = completions(ranks, "llama", "one", prompts, settings, group_size=12)
    lengths = {len(completion.tokens) for completion in together}
    assert len(lengths) > 4, "rows have to end at different times"
    for size in (1, 5):
        for one, other in zip(together, completions(ranks, "llama", "one", prompts, settings, size), strict=True):
            assert one.tokens == other.tokens
            assert other.log_probabilities == pytest.approx(one.log_probabilities, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("where", ["one", "pp2"])
def test_groups_fixed_by_prompt_are_bitwise_the_same(ranks: RankPool, where: str) -> None:
    settings = SamplingSettings(max_new_tokens=24, stop_ids=frozenset(range(8)), seed=3)
    prompts = some_prompts(24)
    whole = completions(ranks, "llama", where, prompts, settings, group_size=6)
    turned = completions(ranks, "llama", where, prompts[12:] + prompts[:12], settings, group_size=6)
    assert turned[12:] + turned[:12] == whole
    assert completions(ranks, "llama", where, prompts[6:12], settings, group_size=6) == whole[6:12]


def test_another_seed_or_sample_draws_anew(ranks: RankPool) -> None:
    settings = SamplingSettings(max_new_tokens=24, seed=1)
    prompts = some_prompts(1, shortest=8)
    again = [Prompt(number, prompts[0].tokens) for number in range(2)]
    first, second = completions(ranks, "llama", "one", again, settings)
    other = completions(ranks, "llama", "one", prompts, SamplingSettings(max_new_tokens=24, seed=2))[0]
    assert len({first.tokens, second.tokens, other.tokens}) == 3


@pytest.mark.parametrize("where", ["one", "tp2_pp2"])
def test_rows_end_at_every_stop_token(ranks: RankPool, where: str) -> None:
    settings = SamplingSettings(max_new_tokens=40, temperature=2.0, stop_ids=frozenset({5, 17, 60}))
    found = completions(ranks, "llama", where, some_prompts(40), settings)
    ends = set()
    for completion in found:
        assert not settings.stop_ids & set(completion.tokens[:-1])
        assert completion.ended == (completion.tokens[-1] in settings.stop_ids)
        assert completion.ended or len(completion.tokens) == 40
        ends.add(completion.tokens[-1] if completion.ended else None)
    assert ends == {5, 17, 60, None}


def test_excluded_tokens_are_never_drawn_and_have_no_probability(ranks: RankPool) -> None:
    free = SamplingSettings(max_new_tokens=30, temperature=3.0)
    excluded = SamplingSettings(max_new_tokens=30, temperature=3.0, excluded_ids=frozenset({0, 50}))
    prompts = some_prompts(40)
    assert {0, 50} <= {token for one in completions(ranks, "llama", "tp2", prompts, free) for token in one.tokens}
    found = completions(ranks, "llama", "tp2", prompts, excluded)
    assert not {0, 50} & {token for one in found for token in one.tokens}
    reference = built("llama")[1]
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([found[0].prompt.tokens])).logits[0, -1].double() / 3.0
    logits[[0, 50]] = -torch.inf
    wanted = torch.log_softmax(logits, -1)[found[0].tokens[0]]
    assert found[0].log_probabilities[0] == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("where", ["one", "pp2"])
def test_prompts_at_the_limit(ranks: RankPool, where: str) -> None:
    rows = [Prompt(number, (1,) * length) for number, length in enumerate((CONTEXT, CONTEXT - 1, CONTEXT - 3, 2))]
    found = completions(ranks, "llama", where, rows, SamplingSettings(max_new_tokens=5), group_size=1)
    assert [len(completion.tokens) for completion in found] == [0, 1, 3, 5]
    together = completions(ranks, "llama", where, rows, SamplingSettings(max_new_tokens=5), group_size=4)
    assert [completion.tokens for completion in together] == [completion.tokens for completion in found]
    assert completions(ranks, "llama", where, [], SamplingSettings(max_new_tokens=5)) == []


@pytest.mark.parametrize(
    ("tokens", "said"), [((), "empty"), ((1,) * (CONTEXT + 1), "129 tokens"), ((VOCAB_SIZE,), "no token")]
)
def test_what_is_no_prompt_is_refused(ranks: RankPool, tokens: tuple[int, ...], said: str) -> None:
    with pytest.raises(Exception, match=said):
        completions(ranks, "llama", "one", [Prompt(0, (1,)), Prompt(1, tokens)], GREEDY)


@pytest.mark.parametrize("grid", [layout(cp=2), layout(pp=2, vpp=2), layout(ep=2, dp=2), layout(dp=2, zero_stage=3)])
def test_layouts_without_generation_are_refused(grid: object) -> None:
    with pytest.raises(RequestError, match="does not go with parallel"):
        refuse_layout(grid)  # type: ignore[arg-type]
