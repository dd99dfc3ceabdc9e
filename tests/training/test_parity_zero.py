"""ZeRO-2 and 3 against one rank, within the bounds of all layouts; and that they hold what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training import moe_cases
from tests.training.parity_cases import MODELS, OTHER_ROUNDINGS, SAME_ROUNDINGS, layout, run_case
from tests.training.trainer_cases import Fault, Run, Seen, train
from tests.training.zero_cases import bytes_held
from training.parity import Bounds, ParityRecord, differences

STEPS = 3
LAYOUTS = {
    "dp2_zero2": layout(dp=2, zero_stage=2),
    "dp2_zero3": layout(dp=2, zero_stage=3),
    "dp4_zero2": layout(dp=4, zero_stage=2),
    "dp4_zero3": layout(dp=4, zero_stage=3),
    "dp2_zero2_overlap": layout(
        dp=2, zero_stage=2, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=20_000
    ),
    "dp2_fsdp2": layout(dp=2, zero_stage=3, zero_implementation="fsdp2"),
    "dp4_fsdp2": layout(dp=4, zero_stage=3, zero_implementation="fsdp2"),
    "tp2_dp2_zero2": layout(tp=2, dp=2, sequence_parallel=True, zero_stage=2),
    "tp2_dp2_zero3": layout(tp=2, dp=2, sequence_parallel=True, zero_stage=3),
    "tp2_dp2_fsdp2": layout(tp=2, dp=2, sequence_parallel=True, zero_stage=3, zero_implementation="fsdp2"),
    "cp2_zero3": layout(cp=2, zero_stage=3),
    "cp2_fsdp2": layout(cp=2, zero_stage=3, zero_implementation="fsdp2"),
    "pp2_dp2_fsdp2": layout(pp=2, dp=2, zero_stage=3, zero_implementation="fsdp2"),
    "pp2_vpp3_dp2_fsdp2": layout(pp=2, vpp=3, dp=2, zero_stage=2, zero_implementation="fsdp2"),
}
CELLS = [
    ("llama", "dp2_zero2"),
    ("llama", "dp2_zero3"),
    ("tied_biased", "dp2_zero2_overlap"),
    ("tied_biased", "dp4_zero3"),
    ("qk_norm", "dp4_zero2"),
    ("tied_biased", "dp2_fsdp2"),
    ("qk_norm", "dp4_fsdp2"),
    ("qk_norm", "tp2_dp2_zero3"),
    ("tied_biased", "tp2_dp2_zero2"),
    ("qk_norm", "tp2_dp2_fsdp2"),
    ("llama", "cp2_zero3"),
    ("tied_biased", "cp2_fsdp2"),
    ("tied_biased", "pp2_dp2_fsdp2"),
    ("six_layers", "pp2_vpp3_dp2_fsdp2"),
    ("dropout", "dp2_zero3"),
]


@pytest.fixture(scope="module")
def references() -> dict[Any, ParityRecord]:
    """One rank's runs, by case."""
    return {}


def assert_equals_one_rank(
    ranks: RankPool, references: dict[Any, ParityRecord], model: str, grid: str, bounds: Bounds, **case: Any
) -> None:
    key = (model, *sorted(case.items()))
    if key not in references:
        references[key] = ranks.run(1, run_case, model, ParallelLayout(), steps=STEPS, **case)[0]
    other = ranks.run(LAYOUTS[grid].world_size, run_case, model, LAYOUTS[grid], steps=STEPS, **case)[0]
    expect_equal(references[key], other, bounds)


def expect_equal(reference: ParityRecord, other: ParityRecord, bounds: Bounds) -> None:
    over = [difference for difference in differences(reference, other, bounds) if not difference.within]
    assert not over, "\n".join(f"{d.quantity}: {d.relative:.2e} > {d.bound:.0e}" for d in over)


@pytest.mark.parametrize(("model", "grid"), CELLS)
def test_sharded_equals_one_rank(ranks: RankPool, references: dict[Any, ParityRecord], model: str, grid: str) -> None:
    assert_equals_one_rank(ranks, references, model, grid, Bounds())


def test_documents_kept_apart(ranks: RankPool, references: dict[Any, ParityRecord]) -> None:
    assert_equals_one_rank(ranks, references, "llama", "dp2_zero3", Bounds(), documents=True)


@pytest.mark.parametrize(
    ("model", "grid", "bounds"),
    [
        ("llama", "dp2_zero3", SAME_ROUNDINGS),
        ("qk_norm", "dp2_zero2", SAME_ROUNDINGS),
        ("tied_biased", "tp2_dp2_zero3", OTHER_ROUNDINGS),
    ],
)
def test_bf16(ranks: RankPool, references: dict[Any, ParityRecord], model: str, grid: str, bounds: Bounds) -> None:
    assert_equals_one_rank(ranks, references, model, grid, bounds, precision="bf16")


@pytest.mark.parametrize(
    ("grid", "recompute"), [("dp2_zero3", "selective"), ("dp2_zero3", "full"), ("dp2_fsdp2", "full")]
)
def test_recomputing_changes_nothing(ranks: RankPool, grid: str, recompute: str) -> None:
    kept = ranks.run(2, run_case, "tied_biased", LAYOUTS[grid], steps=2)[0]
    again = ranks.run(2, run_case, "tied_biased", LAYOUTS[grid], steps=2, recompute=recompute)[0]
    expect_equal(kept, again, Bounds(0, 0, 0))


@pytest.mark.parametrize("grid", ["dp2_zero2", "dp2_zero3", "dp2_fsdp2"])
def test_experts_that_are_not_split(ranks: RankPool, references: dict[Any, ParityRecord], grid: str) -> None:
    if "mixture" not in references:
        references["mixture"] = ranks.run(1, run_mixture, ParallelLayout())[0]
    expect_equal(references["mixture"], ranks.run(2, run_mixture, LAYOUTS[grid])[0], Bounds())


def run_mixture(grid: ParallelLayout) -> ParityRecord | None:
    """A mixture of experts, on the ranks of a pool."""
    MODELS["mixture"] = moe_cases.MODELS["mixtral"]
    return run_case("mixture", grid, steps=2)


@pytest.mark.parametrize(
    ("grid", "held"),
    [
        (layout(dp=2, zero_stage=0), {"weights": 1.0, "gradients": 1.0, "moments": 2.0}),
        (layout(dp=2, zero_stage=1), {"weights": 1.0, "gradients": 1.0, "moments": 1.0}),
        (LAYOUTS["dp2_zero2"], {"weights": 1.0, "gradients": 0.5, "moments": 1.0}),
        (LAYOUTS["dp2_zero3"], {"weights": 0.5, "gradients": 0.5, "moments": 1.0}),
        (LAYOUTS["dp2_fsdp2"], {"weights": 0.5, "gradients": 0.5, "moments": 1.0}),
        (LAYOUTS["dp4_zero3"], {"weights": 0.25, "gradients": 0.25, "moments": 0.5}),
    ],
    ids=lambda value: f"ZeRO-{value.zero_stage} {value.zero_implementation}" if hasattr(value, "dp") else "",
)
def test_every_rank_holds_its_share(ranks: RankPool, grid: ParallelLayout, held: dict[str, float]) -> None:
    counted = ranks.run(grid.world_size, bytes_held, grid)
    for what, share in held.items():
        shares = [rank[what] / rank["whole"] for rank in counted]
        assert max(shares) <= share * 1.03, (what, counted)  # rows are padded
        assert sum(rank[what] for rank in counted) >= share * sum(rank["whole"] for rank in counted), (what, counted)


@pytest.mark.parametrize("grid", ["dp2_zero3", "dp2_fsdp2"])
def test_a_bad_gradient_is_named(ranks: RankPool, tmp_path: Path, token_file: Path, grid: str) -> None:
    fault = Fault("nan", step=2, rank=1, tensor="output_layer.weight")
    seen: list[Seen] = ranks.run(2, train, Run(tmp_path, token_file, LAYOUTS[grid], fault=fault))
    for rank in seen:
        assert rank.error is not None and "rank 1: gradient of output_layer.weight has 1 of" in rank.error


@pytest.mark.parametrize("grid", ["dp2_zero2", "dp2_zero3", "dp2_fsdp2"])
def test_evaluation_and_rollbacks_leave_no_trace(ranks: RankPool, tmp_path: Path, token_file: Path, grid: str) -> None:
    run = Run(
        tmp_path / "one",
        token_file,
        steps=5,
        guards={"on_nan": "rollback"},
        checkpoint={"interval": 2},
        evaluation={"interval": 1, "batches": 2},
    )
    expected: Seen = ranks.run(1, train, run)[0]
    fault = Fault("nan", step=4, rank=1, tensor="output_layer.weight")
    seen: Seen = ranks.run(2, train, run.but(folder=tmp_path / "sharded", layout=LAYOUTS[grid], fault=fault))[0]
    assert seen.error is None and seen.said("rolled back to")
    for record, other in zip(expected.records, seen.records, strict=True):
        assert other.loss == pytest.approx(record.loss, rel=1e-5), record.step
        assert other.grad_norm == pytest.approx(record.grad_norm, rel=5e-5), record.step
        assert other.validation_loss == pytest.approx(record.validation_loss, rel=1e-5), record.step
