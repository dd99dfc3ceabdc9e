"""Every layout against one rank: losses, every gradient of step 1, weights after five steps."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.parity_cases import LAYOUTS, OTHER_ROUNDINGS, SAME_ROUNDINGS, run_case
from training.parity import Bounds, ParityRecord, differences

CELLS = [
    ("llama", "tp2"),
    ("llama", "tp4"),
    ("llama", "tp2_pp2"),
    ("llama", "dp2_zero1"),
    ("llama", "tp2_dp2_overlap"),
    ("tied_biased", "tp2_sp"),
    ("tied_biased", "tp4_sp"),
    ("tied_biased", "pp2"),
    ("tied_biased", "dp2"),
    ("tied_biased", "tp2_pp2_dp2"),
    ("six_layers", "pp4_uneven"),
    ("qk_norm", "tp4_sp"),
    ("qk_norm", "tp2_pp2"),
    ("windowed", "tp2_sp"),
    ("yarn", "dp2_overlap"),
    ("yarn", "tp2_pp2_dp2"),
    ("llama", "pp2_vpp2"),
    ("qk_norm", "tp2_pp2_vpp2"),
    ("tied_biased", "pp2_vpp2_dp2"),
    ("llama", "cp2"),
    ("tied_biased", "cp4"),
    ("qk_norm", "tp2_cp2"),
    ("tied_biased", "cp2_pp2"),
    ("llama", "cp2_dp2"),
    ("yarn", "tp2_cp2_pp2"),
]


@pytest.fixture(scope="module")
def references() -> dict[Any, ParityRecord]:
    """One rank's runs, by case."""
    return {}


def assert_equals_one_rank(
    ranks: RankPool, references: dict[Any, ParityRecord], model: str, grid: str, bounds: Bounds, **case: Any
) -> None:
    """Run a cell and its reference; all differences over their bounds are shown at once."""
    key = (model, *sorted(case.items()))
    if key not in references:
        references[key] = ranks.run(1, run_case, model, ParallelLayout(), **case)[0]
    other = ranks.run(LAYOUTS[grid].world_size, run_case, model, LAYOUTS[grid], **case)[0]
    over = [difference for difference in differences(references[key], other, bounds) if not difference.within]
    assert not over, "\n".join(f"{d.quantity}: {d.relative:.2e} > {d.bound:.0e}" for d in over)


@pytest.mark.parametrize(("model", "grid"), CELLS)
def test_layout_equals_one_rank(ranks: RankPool, references: dict[Any, ParityRecord], model: str, grid: str) -> None:
    assert_equals_one_rank(ranks, references, model, grid, Bounds())


@pytest.mark.parametrize("grid", ["tp2_sp", "pp2", "tp2_pp2_dp2"])
def test_documents_kept_apart(ranks: RankPool, references: dict[Any, ParityRecord], grid: str) -> None:
    assert_equals_one_rank(ranks, references, "llama", grid, Bounds(), documents=True)


def test_positions_restart_on_every_stage(ranks: RankPool, references: dict[Any, ParityRecord]) -> None:
    assert_equals_one_rank(ranks, references, "llama", "tp2_pp2", Bounds(), reset=True, micro_batch_size=2)


def test_larger_micro_batches(ranks: RankPool, references: dict[Any, ParityRecord]) -> None:
    assert_equals_one_rank(ranks, references, "tied_biased", "tp2_pp2_dp2", Bounds(), micro_batch_size=2)


@pytest.mark.parametrize(
    ("grid", "precision", "bounds"), [("tp2_sp", "fp32", Bounds()), ("one", "bf16", OTHER_ROUNDINGS)]
)
def test_gradients_added_up_inside_products(ranks: RankPool, grid: str, precision: str, bounds: Bounds) -> None:
    """A tied matrix among them, which gets gradients from its product and from the look-up both."""
    runs = [
        ranks.run(LAYOUTS[grid].world_size, run_case, model, LAYOUTS[grid], precision=precision, steps=2)[0]
        for model in ("tied_biased", "accumulating")
    ]
    over = [one for one in differences(*runs, bounds) if not one.within]
    assert not over, "\n".join(f"{d.quantity}: {d.relative:.2e} > {d.bound:.0e}" for d in over)


@pytest.mark.parametrize(("model", "grid"), [("llama", "pp2"), ("qk_norm", "dp2_zero1"), ("tied_biased", "dp2")])
def test_bf16_gradients_are_the_same_where_no_matrix_is_split(
    ranks: RankPool, references: dict[Any, ParityRecord], model: str, grid: str
) -> None:
    assert_equals_one_rank(ranks, references, model, grid, SAME_ROUNDINGS, precision="bf16")


@pytest.mark.parametrize(("model", "grid"), [("llama", "tp2_sp"), ("tied_biased", "tp2_pp2_dp2")])
def test_bf16_differs_by_its_roundings_where_matrices_are_split(
    ranks: RankPool, references: dict[Any, ParityRecord], model: str, grid: str
) -> None:
    assert_equals_one_rank(ranks, references, model, grid, OTHER_ROUNDINGS, precision="bf16")


@pytest.mark.parametrize("grid", ["one", "pp2", "tp2_sp", "pp2_vpp2", "cp2"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_nothing(
    ranks: RankPool, references: dict[Any, ParityRecord], grid: str, recompute: str
) -> None:
    kept = ranks.run(LAYOUTS[grid].world_size, run_case, "llama", LAYOUTS[grid])[0]
    again = ranks.run(LAYOUTS[grid].world_size, run_case, "llama", LAYOUTS[grid], recompute=recompute)[0]
    over = [difference for difference in differences(kept, again, Bounds(0, 0, 0)) if not difference.within]
    assert not over


@pytest.mark.parametrize("grid", ["tp2", "pp2", "pp2_vpp2", "dp2_zero1", "tp2_pp2_no_sp"])
def test_dropout_is_the_same_at_every_layout(ranks: RankPool, references: dict[Any, ParityRecord], grid: str) -> None:
    assert_equals_one_rank(ranks, references, "dropout", grid, Bounds())


@pytest.mark.parametrize("grid", ["one", "tp2_sp", "tp2_pp2", "pp2_vpp2"])
def test_dropout_is_the_same_when_recomputed(ranks: RankPool, grid: str) -> None:
    runs = [
        ranks.run(LAYOUTS[grid].world_size, run_case, "all_dropout", LAYOUTS[grid], recompute=recompute)[0]
        for recompute in ("none", "full", "selective")
    ]
    for again in runs[1:]:
        over = [difference for difference in differences(runs[0], again, Bounds(0, 0, 0)) if not difference.within]
        assert not over


@pytest.mark.parametrize("grid", ["pp2"])
def test_fp8_by_torch_stays_near_bf16(ranks: RankPool, references: dict[Any, ParityRecord], grid: str) -> None:
    """Three bits of mantissa a factor: products are 2**-4 / sqrt(3) or so away, sums over many terms as well."""
    bf16 = ranks.run(LAYOUTS[grid].world_size, run_case, "llama", LAYOUTS[grid], precision="bf16", steps=2)[0]
    fp8 = ranks.run(LAYOUTS[grid].world_size, run_case, "llama", LAYOUTS[grid], precision="fp8", steps=2)[0]
    over = [one for one in differences(bf16, fp8, Bounds(loss=1e-2, gradient=0.5, weight=0.2)) if not one.within]
    assert not over, "\n".join(f"{d.quantity}: {d.relative:.2e} > {d.bound:.0e}" for d in over)
    apart = [one.relative for one in differences(bf16, fp8, Bounds()) if one.kind == "gradient"]
    assert max(apart) > 2e-2  # it is another arithmetic
