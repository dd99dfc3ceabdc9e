"""Every layout reads the same micro-batches, and a run that goes on elsewhere or for longer reads the planned ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.samples import DocumentRules, Samples
from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.data_order_cases import read_by, train_and_write_down
from tests.training.trainer_cases import EOD, Run, write_corpus

LAYOUTS = {
    "one rank": ParallelLayout(),
    "tp2 pp2": ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    "dp2": ParallelLayout(data_parallel_size=2),
    "dp4": ParallelLayout(data_parallel_size=4),
}


def planned(token_file: Path, steps: int) -> dict[int, list[list[int]]]:
    """What the order says, without any rank: micro-batches of one sample, four a step."""
    samples = Samples([token_file], [1.0], 16, 1234, DocumentRules(EOD))
    return {number: [samples[number].tokens[:-1].tolist()] for number in range(4 * steps)}


def go(ranks: RankPool, run: Run) -> None:
    assert {seen.error for seen in ranks.run(run.layout.world_size, train_and_write_down, run)} == {None}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_reads_the_planned_batches(ranks: RankPool, tmp_path: Path, token_file: Path, name: str) -> None:
    run = Run(tmp_path, token_file, LAYOUTS[name], steps=3)
    go(ranks, run)
    assert read_by(run) == planned(token_file, 3)


def test_resumed_at_other_sizes_and_for_longer(ranks: RankPool, tmp_path: Path) -> None:
    """3 steps at DP2, then up to 5 at DP4, then up to 10, over the end of an epoch, at TP2 x PP2."""
    few = write_corpus(tmp_path, documents=12)
    run = Run(tmp_path, few)
    for name, steps in (("dp2", 3), ("dp4", 5), ("tp2 pp2", 10)):
        go(ranks, run.but(layout=LAYOUTS[name], steps=steps))
    epoch = Samples([few], [1.0], 16, 1234, DocumentRules(EOD)).samples_per_epoch[0]
    assert epoch < 40 and read_by(run) == planned(few, 10)
    lines = [line for path in tmp_path.glob("read-*.jsonl") for line in path.read_text().splitlines()]
    assert len({line.split(",")[0] for line in lines}) == 40  # none left out
