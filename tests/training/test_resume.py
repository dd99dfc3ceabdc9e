"""A run that was broken off and goes on equals one that was not, bit for bit; guards act as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.trainer_cases import Fault, Run, Seen, train

LAYOUTS = {
    "one rank": ParallelLayout(),
    "tp2 pp2": ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    "dp2 zero0": ParallelLayout(data_parallel_size=2, zero_stage=0),
    "dp2 zero1": ParallelLayout(
        data_parallel_size=2, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=5000
    ),
}
FC2 = "decoder.layers.2.mlp.linear_fc2.weight"


def start(ranks: RankPool, run: Run) -> Seen:
    """What rank 0 saw, after every rank ended alike."""
    said: list[Seen] = ranks.run(run.layout.world_size, train, run)
    assert len({seen.error for seen in said}) == 1, [seen.error for seen in said]
    return said[0]


def metrics(run: Run) -> list[tuple[Any, ...]]:
    """metrics.jsonl, without what is measured."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in ("step", "loss", "grad_norm", "lr", "tokens")) for line in lines]


def same_weights(first: Seen, second: Seen, step: int) -> None:
    one, two = first.weights[step], second.weights[step]
    assert one.keys() == two.keys() and one
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def broken_off_and_resumed(ranks: RankPool, tmp_path: Path, run: Run) -> tuple[Seen, Seen]:
    """(unbroken, resumed): the second run crashes in step 5, after the checkpoint of step 3, and is started again."""
    whole = start(ranks, run.but(folder=tmp_path / "whole"))
    broken = run.but(folder=tmp_path / "broken")
    assert start(ranks, broken.but(fault=Fault("crash", 5))).error == "crash"
    assert [line[0] for line in metrics(broken)] == [1, 2, 3, 4]
    resumed = start(ranks, broken)
    assert resumed.begun_at == 4 and resumed.said("resumed from")
    assert resumed.figures == whole.figures[3:]
    assert metrics(broken) == metrics(run.but(folder=tmp_path / "whole"))
    same_weights(whole, resumed, run.steps + 1)
    return whole, resumed


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_equals_an_unbroken_one(ranks: RankPool, tmp_path: Path, token_file: Path, name: str) -> None:
    whole, _ = broken_off_and_resumed(ranks, tmp_path, Run(tmp_path, token_file, LAYOUTS[name]))
    assert whole.losses[6] < whole.losses[1] - 0.1  # it does train


def test_with_evaluation_bf16_and_documents_apart(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    run = Run(
        tmp_path,
        token_file,
        ParallelLayout(tensor_model_parallel_size=2),
        precision="bf16",
        evaluation={"interval": 2, "batches": 2},
        document_mask=True,
    )
    whole, resumed = broken_off_and_resumed(ranks, tmp_path, run)
    assert [record.validation_loss is not None for record in whole.records] == [False, True] * 3
    assert resumed.held_out == whole.held_out is not None


@pytest.mark.parametrize("zero_implementation", ["megatron_fsdp", "fsdp2"])
def test_with_evaluation_at_zero_2(
    ranks: RankPool, tmp_path: Path, token_file: Path, zero_implementation: Literal["megatron_fsdp", "fsdp2"]
) -> None:
    """A forward pass alone gathers weights; a save behind it, and the search for a bad tensor, look at shards."""
    layout = ParallelLayout(data_parallel_size=2, zero_stage=2, zero_implementation=zero_implementation)
    run = Run(tmp_path, token_file, layout, evaluation={"interval": 1, "batches": 2})
    whole, resumed = broken_off_and_resumed(ranks, tmp_path, run)
    one = start(ranks, run.but(folder=tmp_path / "one", layout=ParallelLayout()))
    for left, right in zip(whole.records, one.records, strict=True):
        assert left.loss == pytest.approx(right.loss, rel=1e-5)
        assert left.validation_loss == pytest.approx(right.validation_loss, rel=1e-5)
    assert resumed.held_out == whole.held_out is not None
    named = start(ranks, run.but(folder=tmp_path / "bad", fault=Fault("nan", 2), guards={"on_nan": "stop"}))
    assert named.error is not None and "gradient of decoder.layers.2.mlp.linear_fc2.weight" in named.error


@pytest.mark.parametrize("name", ["one rank", "tp2 pp2"])
def test_with_dropout(ranks: RankPool, tmp_path: Path, token_file: Path, name: str) -> None:
    """Random streams are a function of the step, so there is none to save."""
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.1}
    run = Run(tmp_path, token_file, LAYOUTS[name], model=dropout)
    whole, _ = broken_off_and_resumed(ranks, tmp_path, run)
    without = start(ranks, run.but(folder=tmp_path / "without", model={}))
    assert without.losses[1] != whole.losses[1]


def test_guards_remember_over_a_resume(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    """Every loss is a spike to these guards once they know three; a run that forgot them would not warn in step 4."""
    guards = {"on_spike": "warn", "spike_factor": 1.0001, "spike_window": 3}
    run = Run(tmp_path, token_file, guards=guards, model={"init_method_std": 0.3})
    whole, resumed = broken_off_and_resumed(ranks, tmp_path, run)
    judged = {record.step: record.guard for record in whole.records}
    assert [judged[step] for step in (1, 2, 3)] == [None] * 3
    assert {record.step: record.guard for record in resumed.records} == {step: judged[step] for step in (4, 5, 6)}


def test_a_finished_run_does_nothing_more(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    run = Run(tmp_path, token_file, steps=2)
    first = start(ranks, run)
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "checkpoints").rglob("*"))
    second = start(ranks, run)
    assert second.records == [] and second.begun_at == 3
    same_weights(first, second, 3)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "checkpoints").rglob("*")) == before
    assert [line[0] for line in metrics(run)] == [1, 2]


@pytest.mark.parametrize("name", ["one rank", "tp2 pp2"])
def test_rollback_repeats_the_unbroken_run(ranks: RankPool, tmp_path: Path, token_file: Path, name: str) -> None:
    run = Run(tmp_path, token_file, LAYOUTS[name], guards={"on_nan": "rollback"})
    whole = start(ranks, run.but(folder=tmp_path / "whole"))
    fault = Fault("nan", 5, rank=run.layout.world_size - 1)
    hurt = start(ranks, run.but(folder=tmp_path / "hurt", fault=fault))
    assert hurt.error is None and hurt.said("rolled back to")
    (verdict,) = hurt.said("step 5: gradient norm is nan")
    assert f"rank {fault.rank}: gradient of {FC2}" in verdict and verdict.endswith(": rollback")
    assert hurt.figures == whole.figures
    assert metrics(run.but(folder=tmp_path / "hurt")) == metrics(run.but(folder=tmp_path / "whole"))
    same_weights(whole, hurt, 7)


def test_a_step_that_goes_wrong_before_the_first_checkpoint_is_done_again(
    ranks: RankPool, tmp_path: Path, token_file: Path
) -> None:
    run = Run(tmp_path, token_file, LAYOUTS["tp2 pp2"], guards={"on_nan": "rollback"})
    whole = start(ranks, run.but(folder=tmp_path / "whole"))
    hurt = start(ranks, run.but(folder=tmp_path / "hurt", fault=Fault("nan", 2, rank=3)))
    assert hurt.error is None and hurt.said("step 2 is done again") and not hurt.said("rolled back to")
    assert hurt.figures == whole.figures
    assert metrics(run.but(folder=tmp_path / "hurt")) == metrics(run.but(folder=tmp_path / "whole"))
    same_weights(whole, hurt, 7)


def test_what_comes_back_after_a_rollback_is_skipped(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    run = Run(tmp_path, token_file, guards={"on_nan": "rollback"}, fault=Fault("nan", 5, times=2), weights_at=(5, 6))
    seen = start(ranks, run)
    assert len(seen.said("rolled back to")) == 1
    (record,) = [record for record in seen.records if record.guard]
    assert record.step == 5 and record.guard is not None and record.guard.startswith("skip: ")
    assert "again after a rollback" in record.guard
    assert [record.step for record in seen.records] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(seen.weights[5][name], seen.weights[6][name]) for name in seen.weights[5])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_skip_leaves_the_update_out_and_says_so(
    ranks: RankPool, tmp_path: Path, token_file: Path, precision: str
) -> None:
    run = Run(
        tmp_path,
        token_file,
        LAYOUTS["dp2 zero1"],
        precision=precision,
        guards={"on_nan": "skip"},
        fault=Fault("nan", 4, tensor="decoder.final_layernorm.weight"),
        weights_at=(3, 4, 5, 6),
    )
    seen = start(ranks, run)
    assert seen.error is None
    assert {record.step: record.guard for record in seen.records if record.guard} == {4: "skip: gradient norm is nan"}
    (said,) = seen.said("step 4: gradient norm is nan")
    assert "decoder.final_layernorm.weight" in said and said.endswith(": skip")
    changed = [
        any(not torch.equal(seen.weights[step][name], seen.weights[step + 1][name]) for name in seen.weights[step])
        for step in (3, 4, 5)
    ]
    assert changed == [True, False, True]
    assert all(torch.isfinite(tensor).all() for tensor in seen.weights[7].values())


def test_stop_names_step_rank_and_tensor(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    run = Run(tmp_path, token_file, LAYOUTS["tp2 pp2"], fault=Fault("nan", 5, rank=3))
    seen = start(ranks, run)
    assert seen.error is not None
    assert "step 5: gradient norm is nan" in seen.error and f"rank 3: gradient of {FC2} has 1 of" in seen.error
    assert "resume" in seen.error
    resumed = start(ranks, run.but(fault=None))
    assert resumed.error is None and resumed.begun_at == 4


@pytest.mark.parametrize("interval", [1, 3])
def test_a_wish_to_stop_is_met_after_a_step_that_saves_anyway(
    interval: int, ranks: RankPool, tmp_path: Path, token_file: Path
) -> None:
    run = Run(tmp_path, token_file, LAYOUTS["dp2 zero1"], fault=Fault("asked", 3, rank=1))
    run = run.but(checkpoint={"interval": interval})
    seen = start(ranks, run)
    assert seen.error is not None and "asked to stop by SIGTERM; it saved after step 3" in seen.error
    assert [line[0] for line in metrics(run)] == [1, 2, 3]
    assert len(seen.said("step 3: saved")) == 1
    assert start(ranks, run.but(fault=None)).begun_at == 4


def test_a_bad_weight_is_named_before_the_gradients_that_it_spoils(
    ranks: RankPool, tmp_path: Path, token_file: Path
) -> None:
    run = Run(tmp_path, token_file, LAYOUTS["tp2 pp2"], fault=Fault("nan weight", 2, rank=3))
    seen = start(ranks, run)  # put in after step 2's gradients, used by its update; step 3 shows it
    assert seen.error is not None
    assert "step 3: loss is nan" in seen.error and "rank 3: weight decoder.layers.2." in seen.error


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data_fingerprint": "another"}, "data"),
        ({"model": {"rotary_base": 20000.0}}, "model.rotary_base (10000.0 there, 20000.0 here)"),
    ],
)
def test_refuses_a_checkpoint_of_another_run(
    ranks: RankPool, tmp_path: Path, token_file: Path, change: dict[str, Any], named: str
) -> None:
    run = Run(tmp_path, token_file, steps=2)
    start(ranks, run)
    refused = start(ranks, run.but(steps=4, **change))
    assert refused.error is not None and "belongs to another run" in refused.error
    assert f"{named} differ" in refused.error and "run.folder" in refused.error
    assert refused.records == []


def test_resume_switched_off_refuses_a_folder_with_checkpoints(
    ranks: RankPool, tmp_path: Path, token_file: Path
) -> None:
    run = Run(tmp_path, token_file, steps=2, checkpoint={"interval": 1, "resume": False})
    assert start(ranks, run).error is None
    refused = start(ranks, run)
    assert refused.error is not None and "checkpoint.resume" in refused.error


def test_another_global_batch_size_is_refused(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    """Step t reads samples t * G and on: with another G a resumed run would repeat samples or leave some out."""
    run = Run(tmp_path, token_file, steps=2)
    assert start(ranks, run).error is None
    refused = start(ranks, run.but(steps=4, global_batch_size=2))
    assert refused.error is not None and "took 64 tokens a step, this run takes 32" in refused.error
    assert "global_batch_size" in refused.error and refused.records == []
