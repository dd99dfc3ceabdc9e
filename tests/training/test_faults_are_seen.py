"""The parity tests can fail: every fault that is put into a layout on purpose is reported, where one would look."""

from __future__ import annotations

import re
from typing import Any

import pytest

from parallel.layout import ParallelLayout
from tests.ranks import RankFailure, RankPool
from tests.training.faults import FAULTS, run_with
from training.parity import Bounds, Difference, ParityRecord, differences

TP2 = ParallelLayout(tensor_model_parallel_size=2)
TP2_SP = ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = ParallelLayout(pipeline_model_parallel_size=2)
DP2 = ParallelLayout(data_parallel_size=2, zero_stage=0)
DP2_ZERO1 = ParallelLayout(data_parallel_size=2, zero_stage=1)
DP2_OVERLAP = ParallelLayout(data_parallel_size=2, zero_stage=0, overlap_grad_reduce=True, bucket_size=20_000)
TP2_DP2 = ParallelLayout(tensor_model_parallel_size=2, data_parallel_size=2)

# fault, layout, case, what is over its bound (a regular expression over quantities), what stays within
SEEN: list[tuple[str, ParallelLayout, dict[str, Any], str, str | None]] = [
    ("loss_normalised_per_micro_batch", DP2, {}, "gradient of output_layer", "loss of step 1"),
    ("loss_mask_ignored", TP2, {}, "loss of step 1", None),
    ("tokens_not_counted_over_replicas", DP2, {}, "gradient of output_layer", "loss of step 1"),
    ("tokens_counted_over_the_wrong_group", TP2, {}, "gradient of output_layer", "loss of step 1"),
    (
        "sequence_parallel_norms_not_summed",
        TP2_SP,
        {},
        "gradient of decoder.final_layernorm",
        "gradient of out",
    ),
    ("qk_norms_not_summed", TP2, {"model": "qk_norm"}, "gradient of .*q_layernorm", "gradient of .*linear"),
    (
        "tied_embeddings_not_summed",
        PP2,
        {"model": "tied_biased"},
        "gradient of embedding",
        "gradient of dec",
    ),
    ("attention_sees_the_future", TP2, {}, "loss of step 1", None),
    ("window_ignored", TP2, {"model": "windowed"}, "loss of step 1", None),
    ("document_borders_ignored", TP2_SP, {"documents": True}, "loss of step 1", None),
    ("positions_not_reset_on_later_stages", PP2, {"reset": True}, "loss of step 1", None),
    ("padding_takes_probability_unchecked", TP2, {}, "loss of step 1", None),
    ("gate_and_up_cut_as_one", TP2, {}, "loss of step 1", None),
    ("weights_seeded_by_rank", TP2, {}, "loss of step 1", None),
    ("gradients_not_reduced_over_replicas", DP2_ZERO1, {}, "gradient of .*linear_fc1", "loss of step 1"),
    ("buckets_never_sent", DP2_OVERLAP, {}, "gradient of .*linear_fc1", "loss of step 1"),
    ("gradients_scattered_over_the_wrong_group", TP2_DP2, {}, "gradient of .*linear_fc1", "loss of step 1"),
    ("updated_shards_not_gathered", DP2_ZERO1, {}, "weight of ", "gradient of "),
    ("norm_counts_tensor_rank_0_only", TP2, {}, "gradient norm of step 1", "gradient of "),
    ("replicas_read_the_same", DP2, {}, "loss of step 1", None),
]


@pytest.fixture(scope="module")
def references() -> dict[Any, ParityRecord]:
    """One rank's runs without faults, by case."""
    return {}


def compared(
    ranks: RankPool, references: dict[Any, ParityRecord], name: str | None, grid: ParallelLayout, case: dict[str, Any]
) -> list[Difference]:
    """One step of `grid` with the fault `name` in it, against one rank without."""
    whole = {"model": "llama", "steps": 1, **case}
    key = tuple(sorted(whole.items()))
    if key not in references:
        references[key] = ranks.run(1, run_with, None, ParallelLayout(), whole)[0]
    return differences(references[key], ranks.run(grid.world_size, run_with, name, grid, whole)[0], Bounds())


@pytest.mark.parametrize(("name", "grid", "case", "seen", "unharmed"), SEEN, ids=[row[0] for row in SEEN])
def test_fault_is_seen(
    ranks: RankPool,
    references: dict[Any, ParityRecord],
    name: str,
    grid: ParallelLayout,
    case: dict[str, Any],
    seen: str,
    unharmed: str | None,
) -> None:
    found = compared(ranks, references, name, grid, case)
    over = [difference.quantity for difference in found if not difference.within]
    assert any(re.match(seen, quantity) for quantity in over), f"over their bounds: {over}"
    if unharmed is not None:  # the report points at the fault, and away from what it leaves alone
        assert not any(re.match(unharmed, quantity) for quantity in over), f"over their bounds: {over}"


@pytest.mark.parametrize(("grid", "case"), sorted({(row[1], tuple(row[2].items())) for row in SEEN}, key=repr))
def test_nothing_is_seen_without_a_fault(
    ranks: RankPool, references: dict[Any, ParityRecord], grid: ParallelLayout, case: tuple[tuple[str, Any], ...]
) -> None:
    assert all(difference.within for difference in compared(ranks, references, None, grid, dict(case)))


def test_padding_that_learns_is_refused(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="rows that pad the vocabulary are not zero"):
        case = {"model": "llama", "steps": 1}
        ranks.run(2, run_with, "padding_takes_probability", TP2, case)


def test_every_fault_is_asked_for() -> None:
    elsewhere = {"padding_takes_probability", "decay_on_norms_and_biases"}  # above; test_against_torch
    assert {row[0] for row in SEEN} | elsewhere == FAULTS.keys()
