"""Live resharding: every pair of layouts, and refits that did not happen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from alignment.ppo.cast import Cast
from alignment.ppo.links import Links
from alignment.ppo.passes import batch_values, policy_values, shared
from alignment.ppo.refit import (
    Part,
    Refit,
    added_up,
    parts_here,
    plan_moves,
    refuse_other_weights,
    stamps_here,
)
from alignment.ppo.rows import Rollout
from alignment.ppo.station import Station
from foundation.errors import WorkError
from model.config import ModelConfig
from model.core_config import core_config
from model.decoder import Decoder, build_decoder_chunks
from model.generation.cache import KeyValueCache
from model.initialization import disturb_vectors, initialize
from model.kernels.choice import TORCH
from parallel.grids import Grids
from parallel.layout import ParallelLayout
from tests.alignment.cases import MODEL
from tests.alignment.ppo.cases import Game, Played, play
from tests.alignment.ppo.test_mathematics import some_rollout
from tests.ranks import RankFailure, RankPool
from tests.training.parity_cases import layout

FOUR = {"tp1": layout(dp=4), "tp2": layout(tp=2, dp=2), "pp2": layout(pp=2, dp=2), "tp2_pp2": layout(tp=2, pp=2)}
VOCAB_SIZE = 45  # not a multiple of two: layouts pad it differently


def decoder_at(grids: Grids, grid: ParallelLayout, seed: int | None) -> Decoder:
    model = ModelConfig.model_validate(MODEL)
    with grids.use(grid), torch.no_grad():
        chunks = build_decoder_chunks(model, core_config(model, grid, "fp32", TORCH), grid, VOCAB_SIZE, TORCH)
        for parameter in chunks[0].parameters():
            parameter.zero_()
        if seed is not None:
            initialize(chunks, model, VOCAB_SIZE, seed)
            disturb_vectors(chunks, seed)
        return chunks[0].eval()


def log_probabilities(grids: Grids, grid: ParallelLayout, decoder: Decoder, rollout: Rollout) -> torch.Tensor:
    with grids.use(grid):
        return batch_values([decoder], grid, [rollout], 1, policy_values(VOCAB_SIZE, 1.0))[0]


def all_pairs() -> dict[str, float]:
    """How far generation is from the actor after each of two refits."""
    links, found = Links(dist.new_group(backend="gloo"), dist.get_rank(), str), {}
    rollout = some_rollout()
    rollout = replace(rollout, tokens=rollout.tokens % VOCAB_SIZE)
    with Grids(list(FOUR.values()), seed=0) as grids:
        for name, grid in FOUR.items():
            actor = decoder_at(grids, grid, seed=1)
            wanted = log_probabilities(grids, grid, actor, rollout)
            with grids.use(grid):
                held, stamps = shared(parts_here([actor], links.rank)), added_up(shared([stamps_here([actor])]))
            for other, target in FOUR.items():
                decoder = decoder_at(grids, target, seed=None)
                with grids.use(target):
                    refit = Refit(plan_moves(held, shared(parts_here([decoder], links.rank))), links)
                with grids.use(grid):
                    refit.send([actor])
                with grids.use(target):
                    refit.receive([decoder])
                    refuse_other_weights(stamps, added_up(shared([stamps_here([decoder])])), 1)
                apart = (log_probabilities(grids, target, decoder, rollout) - wanted).abs().max()
                found[f"{name} -> {other}"] = float(apart)
        links.finish()
    return found


def test_logits_are_the_actors_after_a_reshard_between_any_two_layouts(ranks: RankPool) -> None:
    found = ranks.run(4, all_pairs)[0]
    assert len(found) == 16
    assert {pair: apart for pair, apart in found.items() if not apart < 1e-5} == {}


def test_a_plan_covers_what_is_wanted_or_says_what_lacks() -> None:
    held = [Part(0, "w", (0, 0), (4, 3), True), Part(1, "w", (4, 0), (4, 3), True)]
    moves = plan_moves(held, [Part(1, "w", (2, 0), (8, 3), True)])
    assert [(one.source, one.offset, one.size) for one in moves] == [(0, (2, 0), (2, 3)), (1, (4, 0), (4, 3))]
    for lacking in (held[1:], []):
        with pytest.raises(WorkError, match=" of w "):
            plan_moves(lacking, [Part(1, "w", (0, 0), (8, 3), True)])


APART: dict[str, Any] = {
    "stations": (("actor", "critic"), ("generation", "reference", "reward")),
    "ranks": (1, 1),
}


def skipped(cast: Cast, _station: Station) -> Cast:
    """Weights are not taken in from the second refit on."""
    if cast.sampler is not None:
        refit: Any = cast.sampler._refit
        taken = refit.receive
        calls = iter(range(1000))
        refit.receive = lambda chunks: taken(chunks) if next(calls) == 0 else None
    return cast


def unseen(cast: Cast, _station: Station) -> Cast:
    """Weights are never taken in, and nobody looks at the stamps where they should arrive."""
    if cast.sampler is not None:
        cast.sampler.take_weights = lambda _wanted, _version: None  # type: ignore[method-assign]
    return cast


def play_skipped(game: Game, how: str) -> Played:
    return play(game, skipped if how == "skipped" else unseen)


@pytest.mark.parametrize(
    ("how", "said"), [("skipped", "generation holds other weights"), ("unseen", "other weights than")]
)
def test_a_refit_that_is_left_out_ends_the_run(ranks: RankPool, small: Game, how: str, said: str) -> None:
    with pytest.raises(RankFailure, match=said):
        ranks.run(2, play_skipped, replace(small, **APART), how)


def play_with_stale_keys(game: Game) -> Played:
    """Keys and values of prompts outlive the weights that made them, as a prefix cache that nobody flushed."""
    kept: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    put = KeyValueCache.put

    def stale(self: KeyValueCache, layer: int, keys: torch.Tensor, values: torch.Tensor, step: Any) -> None:
        if step.first:
            keys, values = kept.setdefault((layer, keys.shape), (keys.clone(), values.clone()))
        put(self, layer, keys, values, step)

    KeyValueCache.put = stale  # type: ignore[method-assign]
    try:
        return play(game)
    finally:
        KeyValueCache.put = put  # type: ignore[method-assign]


def test_a_stale_cache_of_keys_and_values_ends_the_run(ranks: RankPool, small: Game) -> None:
    with pytest.raises(RankFailure, match="log-probabilities of generation and of training"):
        ranks.run(1, play_with_stale_keys, replace(small, asked=small.asked[:1], lr=1e-2))
