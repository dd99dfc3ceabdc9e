"""All gloo groups of a rank share one network thread."""

from __future__ import annotations

from tests.parallel.gloo_cases import network_threads_of_many_groups
from tests.ranks import RankPool


def test_groups_share_one_network_thread(ranks: RankPool) -> None:
    for run in range(2):
        assert ranks.run(2, network_threads_of_many_groups) == [(1, 3.0)] * 2, f"run {run}"
