"""FP8 by Transformer Engine on cards of a null GPU that computes: layouts beside one card, recipes beside bf16.

A layout cuts what a scale is taken over, so that values of three bits are rounded elsewhere: losses and norms are near,
not equal, and as near to one another as to bf16's. What a wrong factor, a lost shard or a scale of another tensor would
do is far outside. Runs as tests/null_gpu/test_post_training.py does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.null_gpu.runs import COMPUTES, orthant, steps

if not COMPUTES:
    pytest.skip("needs the null GPU's environment, computing (docs/gpu.md)", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)
WIDE = ("model.hidden_size=256", "model.ffn_hidden_size=512", "training.train_steps=6")
LAYOUTS = {
    "TP2": ("parallel.tensor_model_parallel_size=2",),
    "TP2 and sequence parallel": ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
    "TP2 overlapped": (
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "parallel.tp_comm_overlap=true",
    ),
    "PP2": ("parallel.pipeline_model_parallel_size=2",),
    "DP2": ("parallel.data_parallel_size=2",),
    "CP2": ("parallel.context_parallel_size=2",),
}
LOSS, NORM = 2e-3, 4e-2


@cache
def trained(folder: Any, precision: str, recipe: str, layout: str) -> list[dict[str, Any]]:
    """The six steps of a run."""
    run = folder / f"{precision}-{recipe}-{layout or 'one'}"
    fp8 = (f"training.fp8.recipe={recipe}",) if precision == "fp8" else ()
    # Blocks of 128 values have to fit into what one rank multiplies.
    heads = ("model.num_attention_heads=4", "model.num_query_groups=4") if recipe == "blockwise" else ()
    length = ("training.seq_length=256", "model.max_position_embeddings=256") if recipe == "blockwise" else (
        "training.seq_length=128",)  # fmt: skip
    words = (*WIDE, *heads, *length, *fp8, f"training.precision={precision}", *LAYOUTS.get(layout, ()))
    orthant("cuda", 2 if layout else 1, "train", "configs/tiny.yaml", f"run.folder={run}", *words)
    return steps(run)


@pytest.mark.parametrize("layout", ["", *LAYOUTS])
@pytest.mark.parametrize("recipe", ["current", "delayed", "blockwise"])
def test_fp8_is_near_one_card_and_bf16(recipe: str, layout: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if recipe == "blockwise" and "overlapped" in layout:
        pytest.skip("is refused: user buffers do not take the recipe")
    folder = tmp_path_factory.getbasetemp()
    reference = ("fp8", recipe, "") if layout else ("bf16", recipe, "")
    found, expected = trained(folder, "fp8", recipe, layout), trained(folder, *reference)
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=LOSS), one["step"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=NORM), one["step"]
