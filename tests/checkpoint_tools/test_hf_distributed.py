"""Hugging Face <-> distributed: byte-identical there and back, and the same function in our decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoint_tools.manifest import MANIFEST, read_manifest
from parallel.layout import ParallelLayout
from tests.checkpoint_tools.logits import TOKENS, our_logits
from tests.checkpoint_tools.models import FAMILIES, WEIGHTS_ONLY, converted, file_tensors, same_bits, saved_model
from tests.ranks import RankPool

LAYOUTS = {
    "TP1": ParallelLayout(),
    "TP2": ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": ParallelLayout(pipeline_model_parallel_size=2),
    "TP2 x PP2": ParallelLayout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
}


@pytest.mark.parametrize("family", [*FAMILIES, *WEIGHTS_ONLY])
def test_there_and_back_is_byte_identical(tmp_path: Path, family: str) -> None:
    saved_model(family, tmp_path / "hf", torch.bfloat16)
    converted(tmp_path / "hf", tmp_path / "distributed", "distributed")
    converted(tmp_path / "distributed", tmp_path / "back", "hf")
    original = file_tensors(tmp_path / "hf")
    assert len(original) > 10
    assert same_bits(original, file_tensors(tmp_path / "back")) == []


def test_what_a_ppo_run_goes_on_from_is_kept(tmp_path: Path) -> None:
    saved_model("llama3", tmp_path / "hf", torch.bfloat16)
    converted(tmp_path / "hf", tmp_path / "actor", "distributed")
    state = {"kl_coefficient": 0.25, "tokens": 7}
    manifest = read_manifest(tmp_path / "actor").model_copy(update={"ppo": state})
    (tmp_path / "actor" / MANIFEST).write_text(manifest.model_dump_json())
    converted(tmp_path / "actor", tmp_path / "again", "distributed")
    assert read_manifest(tmp_path / "again").ppo == state


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(ranks: RankPool, tmp_path: Path, family: str) -> None:
    """At every layout, through core's own reader."""
    reference = saved_model(family, tmp_path / "hf")
    converted(tmp_path / "hf", tmp_path / "distributed", "distributed")
    with torch.no_grad():
        theirs = reference(input_ids=TOKENS).logits
    assert float(theirs.std()) > 0.5, "logits near 0 would hide differences"
    for name, layout in LAYOUTS.items():
        ours = next(
            x for x in ranks.run(layout.world_size, our_logits, tmp_path / "distributed", layout) if x is not None
        )
        apart = float((ours - theirs).abs().max() / theirs.abs().max())
        assert apart < 1e-5, f"{name}: {apart}"
