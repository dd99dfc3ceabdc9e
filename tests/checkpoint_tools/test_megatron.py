"""Megatron-LM's rank files: byte-identical there and back at every grid, and core's own GPTModel runs on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.record import RECORD
from foundation.errors import RequestError, WorkError
from parallel.layout import ParallelLayout
from tests.checkpoint_tools.core_model import core_logits
from tests.checkpoint_tools.logits import TOKENS
from tests.checkpoint_tools.models import FAMILIES, WEIGHTS_ONLY, converted, file_tensors, same_bits, saved_model
from tests.ranks import RankPool

GRIDS = {
    "TP2 x PP2": {"tp": 2, "pp": 2},
    "TP4": {"tp": 4},
    "PP2 interleaved": {"pp": 2, "vpp": 2},
    "PP4 local names": {"pp": 4, "local_names": True},
    "one rank": {},
}
MIXTURES = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", [*FAMILIES, *WEIGHTS_ONLY])
def test_there_and_back_is_byte_identical(tmp_path: Path, family: str, grid: str) -> None:
    saved_model(family, tmp_path / "hf", torch.bfloat16)
    converted(tmp_path / "hf", tmp_path / "ranks", "megatron", **GRIDS[grid])
    converted(tmp_path / "ranks", tmp_path / "back", "hf")
    assert same_bits(file_tensors(tmp_path / "hf"), file_tensors(tmp_path / "back")) == []


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("grid", [{"ep": 2}, {"ep": 2, "tp": 2}, {"ep": 4, "pp": 2, "tp": 2}])
def test_experts_on_ranks_of_their_own(tmp_path: Path, family: str, grid: dict[str, int]) -> None:
    saved_model(family, tmp_path / "hf", torch.bfloat16)
    converted(tmp_path / "hf", tmp_path / "ranks", "megatron", **grid)
    converted(tmp_path / "ranks", tmp_path / "distributed", "distributed")
    converted(tmp_path / "distributed", tmp_path / "back", "hf")
    assert same_bits(file_tensors(tmp_path / "hf"), file_tensors(tmp_path / "back")) == []


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "qwen2_tied", "mixtral"])
def test_without_our_record_the_arguments_tell(tmp_path: Path, family: str) -> None:
    """Rank files alone, as Megatron-LM leaves them."""
    saved_model(family, tmp_path / "hf", torch.bfloat16)
    converted(tmp_path / "hf", tmp_path / "ranks", "megatron", tp=2, pp=2)
    (tmp_path / "ranks" / "release" / RECORD).unlink()
    converted(tmp_path / "ranks", tmp_path / "back", "hf")
    assert same_bits(file_tensors(tmp_path / "hf"), file_tensors(tmp_path / "back")) == []
    there, here = (open_checkpoint(tmp_path / name).identity.model for name in ("hf", "back"))
    assert there == here


CORE_LAYOUTS: dict[str, ParallelLayout] = {
    "TP2 x PP2": ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "TP4": ParallelLayout(tensor_model_parallel_size=4),
    "PP2 interleaved": ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}
OF_CORE = [family for family in FAMILIES if family != "llama3_1"]
"""GPTModel knows Llama 3.1's frequencies for 8192 tokens only, which these small models do not have."""


@pytest.mark.parametrize("family", OF_CORE)
def test_gpt_model_of_core_loads_them(ranks: RankPool, tmp_path: Path, family: str) -> None:
    reference = saved_model(family, tmp_path / "hf")
    with torch.no_grad():
        theirs = reference(input_ids=TOKENS).logits
    for name, layout in CORE_LAYOUTS.items():
        folder = tmp_path / name.replace(" ", "")
        grid = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp}
        converted(tmp_path / "hf", folder, "megatron", local_names=True, **grid)
        found = ranks.run(layout.world_size, core_logits, folder / "release", layout)
        ours = next(logits for logits in found if logits is not None)
        apart = float((ours - theirs).abs().max() / theirs.abs().max())
        assert apart < 1e-5, f"{name}: {apart}"


@pytest.mark.parametrize(
    ("family", "grid", "said"),
    [
        ("llama3", {"tp": 3}, "--tp 3"),
        ("llama3", {"tp": 8}, "query groups"),
        ("llama3", {"pp": 3}, "layers"),
        ("llama3", {"vpp": 2}, "--vpp 2"),
        ("llama3", {"ep": 2}, "--ep 2"),
        ("mixtral", {"ep": 3}, "experts"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(tmp_path: Path, family: str, grid: dict[str, int], said: str) -> None:
    saved_model(family, tmp_path / "hf")
    with pytest.raises(RequestError, match=said):
        converted(tmp_path / "hf", tmp_path / "ranks", "megatron", **grid)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_ranks_that_drifted_apart_are_seen(tmp_path: Path) -> None:
    """A norm that differs from one tensor-parallel rank to the other."""
    saved_model("llama3", tmp_path / "hf")
    converted(tmp_path / "hf", tmp_path / "ranks", "megatron", tp=2)
    (tmp_path / "ranks" / "release" / RECORD).unlink()
    path = tmp_path / "ranks" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["model"]["decoder.final_layernorm.weight"][3] += 1
    torch.save(state, path)
    with pytest.raises(WorkError, match=r"copies of decoder.final_layernorm.weight differ"):
        converted(tmp_path / "ranks", tmp_path / "back", "hf")
