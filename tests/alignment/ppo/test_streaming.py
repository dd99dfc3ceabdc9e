"""Roles apart: what streams ends in the bits of what runs one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from alignment.ppo.cast import Cast
from alignment.ppo.generation import Generator
from alignment.ppo.rows import Rollout
from alignment.ppo.station import Station
from foundation.errors import WorkError
from parallel.layout import ParallelLayout
from tests.alignment.ppo.cases import Game, Played, play
from tests.ranks import RankFailure, RankPool
from tests.training.parity_cases import layout
from training.stopping import StopRequest

AHEAD: dict[str, Any] = {"stations": (("actor", "critic"), ("generation", "reference", "reward")), "ranks": (1, 1)}
BESIDE: dict[str, Any] = {"stations": (("actor", "generation"), ("critic", "reference", "reward")), "ranks": (1, 1)}


def both_hashes(played: list[Played]) -> dict[str, str]:
    return {name: value for one in played for name, value in one.hashes.items()}


def play_out_of_order(game: Game) -> Played:
    """Groups end in another order than they began."""

    def shuffled(cast: Cast, _station: Station) -> Cast:
        if cast.sampler is not None:
            generator: Any = cast.sampler._generator
            cast.sampler._generator = _Shuffled(generator)  # type: ignore[assignment]
        return cast

    return play(game, shuffled)


class _Shuffled:
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def stream(self, groups: Any, version: int) -> Iterator[tuple[int, Rollout]]:
        yield from list(self._generator.stream(groups, version))[::-1]


def test_streamed_ends_in_the_bits_of_sequential_at_staleness_0(ranks: RankPool, small: Game) -> None:
    one = ranks.run(1, play, small)[0]
    sequential = replace(small, ppo=small.ppo | {"stream": False}, **BESIDE)
    for played in (
        ranks.run(2, play, replace(small, **BESIDE)),
        ranks.run(2, play, sequential),
        ranks.run(2, play_out_of_order, replace(small, **BESIDE)),
    ):
        assert both_hashes(played) == one.hashes
        assert [record["reward"] for record in played[0].records] == [record["reward"] for record in one.records]
        assert "value_loss" in played[0].records[-1]


def test_staleness_1_ends_in_the_bits_of_its_simulation_on_one_rank(ranks: RankPool, small: Game) -> None:
    game = replace(small, iterations=3, ppo=small.ppo | {"staleness": 1})
    one = ranks.run(1, play, game)[0]
    apart = ranks.run(2, play, replace(game, **AHEAD))
    assert both_hashes(apart) == one.hashes
    for played in (one, apart[0]):
        assert [record["staleness"] for record in played.records] == [0.0, 1.0, 1.0]
        assert played.records[1]["generation_mismatch_max"] > 1e-3, "an older policy sampled"
        assert played.records[1]["behaviour_ess"] < 1.0


def test_stations_of_several_ranks_learn_what_one_rank_learns(ranks: RankPool, small: Game) -> None:
    one = ranks.run(1, play, small)[0]
    layouts = {
        "actor": layout(tp=2),
        "critic": layout(pp=2),
        "generation": layout(pp=2),
        "reference": ParallelLayout(data_parallel_size=2),
        "reward": ParallelLayout(data_parallel_size=2),
    }
    game = replace(small, stations=AHEAD["stations"], ranks=(2, 2), layouts=layouts)
    found = ranks.run(4, play, game)[0]
    assert found.log_policy is not None and np.abs(found.log_policy - one.log_policy).max() < 1e-3


def play_and_lose(game: Game, lost: int) -> Played:
    """Rank `lost` ends in the middle of the second iteration."""
    import os
    import time

    import torch.distributed as dist

    here = dist.get_rank()

    def judge(rollout: Rollout) -> list[float]:
        from tests.alignment.ppo.cases import score

        if here == lost and int(rollout.sample_ids[0]) >= game.batch:
            os._exit(9)
        return score(rollout)

    def end(iteration: int, what: str) -> None:
        if here == lost and iteration == 1 and what == "learn":
            time.sleep(0.1)
            os._exit(9)

    return play(game, hook=end, scored=judge)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_role_that_dies_ends_the_others_with_a_message(ranks: RankPool, small: Game, lost: int) -> None:
    with pytest.raises(RankFailure) as failed:
        ranks.run(2, play_and_lose, replace(small, **BESIDE), lost)
    other = next(one for one in failed.value.failures if one.rank != lost)
    assert (
        f"lost rank {lost}" in other.detail and ("actor, generation", "critic, reference, reward")[lost] in other.detail
    )


class Asked(StopRequest):
    """A signal that came before an iteration."""

    def __init__(self, iteration: int) -> None:
        super().__init__()
        self._left = iteration

    def agreed(self, device: torch.device) -> str | None:
        self._left -= 1
        return "SIGUSR1" if self._left < 0 else None


def play_until(game: Game, how: str, iteration: int) -> str:
    """What ends a run early: a signal before the learning of an iteration, or a crash after."""

    def crash(now: int, what: str) -> None:
        if how == "crash" and (now, what) == (iteration, "learn"):
            raise KeyboardInterrupt

    try:
        play(game, hook=crash, stop=Asked(iteration) if how == "signal" else None)
    except (WorkError, KeyboardInterrupt) as error:
        return f"{type(error).__name__} {error}"
    return "went on to the end"


def test_25_a_run_that_crashed_with_answers_under_way_goes_on_to_the_same_bits(ranks: RankPool, small: Game) -> None:
    """At staleness 0: tests/launch/test_ppo.py."""
    game = replace(small, iterations=3, interval=1, keeps=True, ppo=small.ppo | {"staleness": 1})
    whole = ranks.run(1, play, game)[0]
    again = replace(game, folder=game.folder.with_name("again"))
    assert ranks.run(1, play_until, again, "crash", 2)[0].startswith("Keyboard")
    assert (again.folder / "under_way" / "batch_00000002.rows").is_file()
    rest = ranks.run(1, play, again)[0]
    assert rest.hashes == whole.hashes and rest.events[0] == "resumed after iteration 2"
    assert [one["staleness"] for one in rest.records] == [1.0]


def test_a_signal_ends_stations_that_are_apart_with_both_states_saved(ranks: RankPool, small: Game) -> None:
    game = replace(small, interval=2, keeps=True, **BESIDE)
    assert "SIGUSR1" in ranks.run(2, play_until, game, "signal", 0)[0]
    for folder in (game.folder, game.folder / "critic"):
        assert [path.name for path in (folder / "checkpoints").glob("step_*")] == ["step_00000001"]
    rest = ranks.run(2, play, game)
    assert both_hashes(rest) == ranks.run(1, play, small)[0].hashes
