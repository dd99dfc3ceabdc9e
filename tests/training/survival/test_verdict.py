"""Who holds a hung run up, told from what ranks last said."""

from __future__ import annotations

import socket
from typing import Any

from training.survival.heartbeat import Beat, Details, Wait, Who
from training.survival.network import open_port, unreachable
from training.survival.verdict import Observed, Verdict, judge, listed

WORLD, PAIR = tuple(range(4)), (2, 3)
REDUCE = Wait("all_reduce", "training/stopping.py:33 agreed", "world", WORLD)
IN_PAIR = Wait("all_gather", "megatron/core/mappings.py:9 gather", "pair", PAIR)


def beat(rank: int, **values: Any) -> Beat:
    who = Who(rank, rank % 2, f"n{1 + rank // 2}", 100 + rank, "here", "1")
    given = {"number": 5, "step": 7, "phase": "agreement", "stalled": 20.0, "details": Details(REDUCE, ())}
    return Beat(who, **(given | values))


def judged(
    *beats: Beat | None, silent: dict[int, float] | None = None, process: dict[int, str] | None = None
) -> Verdict:
    silent, process = silent or {}, process or {}
    seen = [Observed(rank, one, silent.get(rank, 0.0), process.get(rank)) for rank, one in enumerate(beats)]
    return judge(seen, 0, 20.0, 4.0)


def test_a_stopped_rank_is_named_with_its_node_and_last_place() -> None:
    stopped = beat(2, step=7, phase="forward and backward", details=None)
    verdict = judged(beat(0), beat(1), stopped, beat(3), process={2: "stopped"})
    assert list(verdict.culprits) == [2] and verdict.step == 7
    text = verdict.render()
    assert "the run hangs in step 7, agreement: no rank got on for 20 s" in text
    assert "missing: rank 2 on n2: its process 102 is stopped; last seen in step 7, forward and backward" in text
    assert "waiting: ranks 0-1, 3 in all_reduce of ranks 0-3 (training/stopping.py:33 agreed)" in text


def test_ranks_of_a_node_that_says_nothing_are_named() -> None:
    verdict = judged(beat(0), beat(1), beat(2, details=None), beat(3, details=None), silent={2: 9.0, 3: 8.0})
    assert list(verdict.culprits) == [2, 3]
    assert "no sign of life for 9 s" in verdict.culprits[2]


def test_a_rank_that_is_late_with_a_heartbeat_is_not_silent() -> None:
    verdict = judged(beat(0), beat(1), beat(2), beat(3), silent={2: 3.9})
    assert verdict.culprits == {} and "no rank stands out" in verdict.render()


def test_a_rank_that_never_spoke_is_named() -> None:
    verdict = judged(beat(0), beat(1), None, beat(3))
    assert verdict.culprits == {2: "it never said anything"}
    assert "rank 2 on an unknown node" in verdict.render()


def test_a_rank_at_work_holds_up_those_that_wait() -> None:
    at = ("data/batches.py:40 read", "training/trainer.py:9 _step")
    verdict = judged(beat(0), beat(1, details=Details(None, at), phase="data"), beat(2), beat(3))
    assert verdict.culprits == {1: "it is at data/batches.py:40 read, in step 7, data"}


def test_all_at_work_names_nobody() -> None:
    """As over NCCL, where the host's thread waits for its device."""
    working = [beat(rank, details=Details(None, ("torch/_tensor.py:1 item",))) for rank in range(4)]
    assert judged(*working).culprits == {}


def test_a_rank_that_went_elsewhere_is_missing_in_a_collective() -> None:
    behind = Details(IN_PAIR, (), {"world": 6, "pair": 3})
    ahead = Details(REDUCE, (), {"world": 7, "pair": 3})
    verdict = judged(beat(0, details=ahead), beat(1, details=ahead), beat(2, details=ahead), beat(3, details=behind))
    assert list(verdict.culprits) == [3]
    assert "waits in all_gather of ranks 2-3" in verdict.culprits[3] and "not in all_reduce" in verdict.culprits[3]


def test_two_that_wait_for_each_other_are_both_named() -> None:
    first, second = Details(IN_PAIR, (), {"world": 6, "pair": 3}), Details(REDUCE, (), {"world": 7, "pair": 2})
    verdict = judged(beat(0, details=second), beat(1, details=second), beat(2, details=second), beat(3, details=first))
    assert set(verdict.culprits) == {2, 3}


def test_who_waits_for_a_missing_rank_is_not_missing_itself() -> None:
    """Rank 0 waits for all, rank 2 in its pair for rank 3, which works: only rank 3 holds the run up."""
    world = Details(REDUCE, (), {"world": 7})
    pair = Details(IN_PAIR, (), {"world": 6, "pair": 3})
    verdict = judged(
        beat(0, details=world), beat(1, details=world), beat(2, details=pair),
        beat(3, details=Details(None, ("tests/x.py:1 sleep",))),
    )  # fmt: skip
    assert list(verdict.culprits) == [3]


def test_a_node_that_others_cannot_reach_is_named() -> None:
    def on(node: int, unreachable: tuple[str, ...]) -> Beat:
        who = Who(node, 0, f"n{node}", 1, "here", "1")
        return Beat(who, 5, 7, "forward and backward", 20.0, Details(REDUCE, (), {}, unreachable))

    verdict = judged(on(0, ("n2",)), on(1, ("n2",)), on(2, ("n0", "n1", "n3")), on(3, ("n2",)))
    assert list(verdict.culprits) == [2]
    assert "3 of 3 other nodes cannot connect to n2" in verdict.culprits[2]


def test_a_node_that_one_of_many_cannot_reach_is_not_named() -> None:
    details = [Details(REDUCE, (), {}, ("n3",) if rank == 0 else ()) for rank in range(8)]
    assert judged(*(beat(rank, details=one) for rank, one in enumerate(details))).culprits == {}


def test_a_rank_that_says_nothing_comes_before_nodes_that_are_cut_off() -> None:
    """Whatever nodes do not answer, a stopped process is certain."""
    details = [Details(REDUCE, (), {}, ("n2",)) for _ in range(4)]
    verdict = judged(*(beat(rank, details=one) for rank, one in enumerate(details)), process={1: "stopped"})
    assert list(verdict.culprits) == [1]


def test_of_two_nodes_both_ends_of_the_cable_are_named() -> None:
    details = [Details(REDUCE, (), {}, (name,)) for name in ("n2", "n2", "n1", "n1")]
    assert set(judged(*(beat(rank, details=one) for rank, one in enumerate(details))).culprits) == {0, 1, 2, 3}


def test_many_ranks_are_listed_in_runs() -> None:
    assert listed([7, 0, 1, 2, 9, 10]) == "0-2, 7, 9-10"
    verdict = judged(beat(0), *(None for _ in range(20)))
    assert len(verdict.culprits) == 20 and "and 12 more: ranks 1-20" in verdict.render()


def test_a_node_that_was_often_asked_is_still_there() -> None:
    """Whenever a rank does not get on for a while each node asks each: what is never taken up fills the kernel's queue,
    and then every node would pass for cut off."""
    port = open_port()
    for _ in range(700):
        socket.create_connection(("127.0.0.1", port), timeout=20.0).close()
    assert unreachable({"n2": ("127.0.0.1", port), "n3": ("127.0.0.1", 1)}, seconds=20.0) == ["n3"]
