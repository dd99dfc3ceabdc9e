"""Checkpoints of mixtures of experts: what one spread of the experts writes, any other reads, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.moe_cases import MODELS
from tests.training.parity_cases import layout
from tests.training.test_checkpoint import begin_from, compare_tensors, load_and_save, run_at
from tests.training.trainer_cases import Run

EXPERTS = {name: value for name, value in MODELS["mixtral"].items() if name.startswith(("num_experts", "moe_"))}
EP2 = layout(dp=2, ep=2)
OTHERS = {
    "one": ParallelLayout(),
    "tp2 ep2": layout(tp=2, dp=2, ep=2, sequence_parallel=True),
    "pp2 ep2": layout(pp=2, dp=2, ep=2),
    "dp4 ep2 without zero": layout(dp=4, ep=2, zero_stage=0),
}


@pytest.fixture(scope="module")
def source(ranks: RankPool, token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of six steps at EP2 with a checkpoint after the third."""
    run = Run(tmp_path_factory.mktemp("ep2"), token_file, EP2, model=EXPERTS, weights_at=(4,))
    seen = run_at(ranks, run)
    assert seen.records[0].load_balancing_loss == pytest.approx(1.0, rel=0.5)
    assert seen.records[0].router_z_loss is not None and seen.records[0].values()["router_z_loss"] > 0
    return run


@pytest.mark.parametrize("name", OTHERS)
def test_weights_and_moments_are_the_same(ranks: RankPool, tmp_path: Path, source: Run, name: str) -> None:
    run = source.but(folder=begin_from(source, 3, tmp_path), layout=OTHERS[name])
    ranks.run(run.layout.world_size, load_and_save, run)
    first, second = (tmp_path / "checkpoints" / f"step_0000000{step}" for step in (3, 4))
    different, moments = ranks.run(1, compare_tensors, first, second)[0]
    assert not different
    # Stacked over layers and experts: embedding, output, last norm, 7 tensors of a layer; two moments each.
    assert moments == 2 * 10


@pytest.mark.parametrize("name", ["one", "tp2 ep2"])
def test_training_goes_on_alike(ranks: RankPool, tmp_path: Path, source: Run, name: str) -> None:
    whole = run_at(ranks, source.but(folder=begin_from(source, 3, tmp_path / "same")))
    other = run_at(ranks, source.but(folder=begin_from(source, 3, tmp_path / "other"), layout=OTHERS[name]))
    assert other.begun_at == whole.begun_at == 4
    for step in (4, 5, 6):
        assert other.losses[step] == pytest.approx(whole.losses[step], rel=1e-6)
    balance = [(record.load_balancing_loss, record.router_z_loss) for record in whole.records]
    assert [(record.load_balancing_loss, record.router_z_loss) for record in other.records] == [
        pytest.approx(pair, rel=1e-5) for pair in balance
    ]
