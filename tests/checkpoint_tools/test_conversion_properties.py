"""Conversions between grids that nobody chose: every chain that is not refused ends with the bytes it began with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.formats.rank_cuts import RankGrid
from foundation.errors import RequestError
from tests.checkpoint_tools.models import FAMILIES, converted, file_tensors, same_bits, saved_model

GROUPS = st.sampled_from([1, 2, 4])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A family at a tiny shape; its head counts need not divide by any grid."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    groups, share = draw(GROUPS), draw(st.sampled_from([1, 2, 3]))
    sizes = {
        "num_hidden_layers": draw(st.integers(1, 6)),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * share,
        "hidden_size": groups * share * 2,
        "intermediate_size": draw(st.sampled_from([4, 6, 8])),
        "vocab_size": draw(st.integers(3, 300)),
    }
    if "head_dim" in FAMILIES[family][1]:
        sizes["head_dim"] = draw(st.sampled_from([2, 6]))
    if "num_experts" in FAMILIES[family][1] or "num_local_experts" in FAMILIES[family][1]:
        name = "num_experts" if "num_experts" in FAMILIES[family][1] else "num_local_experts"
        sizes[name] = draw(st.sampled_from([2, 3, 4]))
    return family, sizes


GRIDS = st.builds(
    RankGrid,
    tp=st.sampled_from([1, 2, 4]),
    pp=st.integers(1, 3),
    vpp=st.integers(1, 2),
    ep=st.sampled_from([1, 2]),
    local_names=st.booleans(),
)


def fits(grid: RankGrid, sizes: dict[str, Any], experts: int, ffn: int) -> bool:
    """What a grid has to divide, from the rules as docs/checkpoints.md has them."""
    whole_heads = sizes["num_key_value_heads"] % grid.tp == 0 and ffn % grid.tp == 0
    stages = sizes["num_hidden_layers"] % (grid.pp * grid.vpp) == 0 and (grid.vpp == 1 or grid.pp > 1)
    return whole_heads and stages and (experts % grid.ep == 0 if experts else grid.ep == 1)


@settings(max_examples=-(-settings.default.max_examples // 3))  # each is a fifth of a second
@given(shapes(), GRIDS, GRIDS)
def test_any_chain_of_grids_gives_the_bytes_back(
    shape: tuple[str, dict[str, Any]], first: RankGrid, second: RankGrid
) -> None:
    family, sizes = shape
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved_model(family, folder / "hf", torch.bfloat16, **sizes)
        config = open_checkpoint(folder / "hf").identity.model
        experts = config.num_experts or 0
        ffn = (config.moe_ffn_hidden_size or config.ffn_hidden_size) if experts else config.ffn_hidden_size
        converted(folder / "hf", folder / "distributed", "distributed")
        before = folder / "distributed"
        for number, grid in enumerate((first, second)):
            if fits(grid, sizes, experts, ffn):
                converted(before, folder / f"ranks{number}", "megatron", **vars(grid))
                before = folder / f"ranks{number}"
            else:
                with pytest.raises(RequestError):
                    converted(before, folder / "refused", "megatron", **vars(grid))
                assert not (folder / "refused").exists()
        converted(before, folder / "back", "hf")
        assert same_bits(file_tensors(folder / "hf"), file_tensors(folder / "back")) == []
