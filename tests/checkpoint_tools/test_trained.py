"""Checkpoints that training wrote, at layouts of every kind, on their way to other formats; and a training that goes
on from a converted one, moments included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.catalog import Catalog, state_fault
from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.planning import Form
from checkpoint_tools.rows import CatalogRows, Scratch
from checkpoint_tools.soundness import check
from foundation.errors import WorkError
from launch.cli import main
from parallel.layout import ParallelLayout
from tests.checkpoint_tools.models import converted
from tests.ranks import RankPool
from tests.training.trainer_cases import EOD, Run, Seen, train, write_corpus

ALONE = Manner(processes=1)
MIXTURE = {"num_experts": 4, "moe_router_topk": 2}
RUNS: dict[str, dict[str, Any]] = {
    "tp2 pp2": {
        "layout": ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
        "model": {"num_query_groups": 2, "kv_channels": 12, "add_qkv_bias": True, "make_vocab_size_divisible_by": 64},
    },
    "interleaved, tied": {
        "layout": ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        "model": {"share_embeddings_and_output_weights": True, "qk_layernorm": True},
    },
    "tp2 ep2 dp2": {
        "layout": ParallelLayout(
            tensor_model_parallel_size=2, expert_model_parallel_size=2, data_parallel_size=2, sequence_parallel=True
        ),
        "model": MIXTURE,
    },
    "zero 3": {"layout": ParallelLayout(data_parallel_size=2, zero_stage=3)},
    "bf16, zero 1": {"layout": ParallelLayout(data_parallel_size=2), "precision": "bf16"},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def trained(ranks: RankPool, run: Run) -> Seen:
    """What rank 0 saw."""
    seen: Seen = ranks.run(run.layout.world_size, train, run)[0]
    assert seen.error is None
    return seen


def whole(catalog: Catalog) -> dict[str, torch.Tensor]:
    """Every tensor of a catalog, as torch has it."""
    found: dict[str, torch.Tensor] = {}
    with CatalogRows(catalog) as rows:
        for name, tensor in catalog.tensors.items():
            block = Scratch().block(tensor.rows, tensor.columns, tensor.dtype)
            rows.fill(name, 0, block)
            as_torch = torch.from_numpy(block.copy()).view(getattr(torch, tensor.dtype.torch))
            found[name] = as_torch.view(tensor.shape)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_what_training_wrote_is_read_bit_for_bit(ranks: RankPool, tmp_path: Path, corpus: Path, name: str) -> None:
    """In all formats, from pieces of any ranks and rows of any replicas."""
    run = Run(tmp_path / "run", corpus, steps=2, checkpoint={"interval": 2}, **RUNS[name])
    weights = trained(ranks, run).weights[3]
    catalog = open_checkpoint(tmp_path / "run")
    assert catalog.step == 2
    kinds = {name.split(".")[2] for name in catalog.optimizer_state}
    assert kinds == {"param", "exp_avg", "exp_avg_sq"} and state_fault(catalog) is None
    converted(tmp_path / "run", tmp_path / "hf", "hf")
    # Families have numbers of their own for both, which are other tokens here.
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, EOD)
    converted(tmp_path / "run", tmp_path / "megatron", "megatron", pp=2)
    for read in (catalog, open_checkpoint(tmp_path / "hf"), open_checkpoint(tmp_path / "megatron")):
        found = whole(read)
        assert {key for key in found if not key.startswith("optimizer")} == weights.keys()
        assert [key for key in weights if not torch.equal(found[key], weights[key])] == []


@pytest.mark.parametrize("name", ["tp2 pp2", "bf16, zero 1"])
def test_a_training_goes_on_from_a_converted_checkpoint(
    ranks: RankPool, tmp_path: Path, corpus: Path, name: str
) -> None:
    """distributed -> distributed: weights, master weights and both moments in new files, and the losses that follow."""
    run = Run(tmp_path / "run", corpus, steps=6, **RUNS[name])
    unbroken = trained(ranks, run)
    there = tmp_path / "run" / "checkpoints" / "step_00000003"
    converted(there, tmp_path / "other" / "checkpoints" / "step_00000003", "distributed")
    resumed = trained(ranks, run.but(folder=tmp_path / "other"))
    assert resumed.begun_at == 4 and resumed.figures == unbroken.figures[3:]
    one, two = unbroken.weights[7], resumed.weights[7]
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def test_damage_of_a_trained_checkpoint_is_found_before_it_is_converted(
    ranks: RankPool, tmp_path: Path, corpus: Path
) -> None:
    trained(ranks, Run(tmp_path / "run", corpus, steps=2, checkpoint={"interval": 2}))
    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    assert check(folder).faults == ()
    path = next(folder.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert path.name in check(folder).faults[0]
    with pytest.raises(WorkError, match=path.name):
        convert(tmp_path / "run", tmp_path / "out", Form("hf"), ALONE)


def test_moments_that_are_left_aside_are_said(ranks: RankPool, tmp_path: Path, corpus: Path) -> None:
    trained(ranks, Run(tmp_path / "run", corpus, steps=2, checkpoint={"interval": 2}))
    for kind in ("hf", "megatron"):
        report = converted(tmp_path / "run", tmp_path / kind, kind)
        assert any("optimizer" in note for note in report.notes)
    shutil.rmtree(tmp_path / "hf")


def test_state_in_parts_of_rows_is_converted_and_compared(
    ranks: RankPool, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ParallelLayout(data_parallel_size=4, overlap_grad_reduce=True, bucket_size=3000)
    run = Run(tmp_path / "run", corpus, layout, steps=2, checkpoint={"interval": 2})
    trained(ranks, run)
    source = run.folder / "checkpoints/step_00000002"
    catalog = open_checkpoint(source)
    cut = [tensor for tensor in catalog.optimizer_state.values() if any(piece.column for piece in tensor.pieces)]
    assert len(cut) > 10 and check(source).faults == ()
    for form in ("distributed", "hf"):
        convert(source, tmp_path / form, Form(form), ALONE)
    ours, theirs = whole(catalog), whole(open_checkpoint(tmp_path / "distributed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    capsys.readouterr()
    assert main(["ckpt", "diff", str(source), str(tmp_path / "distributed")]) == 0
    assert capsys.readouterr().err.endswith("no value differs\n")
    assert main(["ckpt", "diff", str(tmp_path / "hf"), str(source)]) == 0
    assert f"only {source} holds optimizer state: weights alone are compared" in capsys.readouterr().err
