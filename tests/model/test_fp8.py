"""The FP8 section, what a chip has to have, and torch's scaled products."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from foundation.errors import ConfigError
from model.config import ModelConfig
from model.core_config import core_config
from model.decoder import build_decoder_chunks
from model.fp8 import SINCE, Fp8Config, check_bf16_layers, check_chip
from model.kernels.choice import TORCH
from model.kernels.fp8_linear import BACKWARD, FORWARD, _Scaled, quantised, scaled_product
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.ranks import RankPool


def refused(**fields: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Fp8Config.model_validate(fields)
    return caught.value


def test_delayed_scaling_has_no_layers_in_bf16() -> None:
    wrong = refused(recipe="delayed", first_last_layers_bf16=True)
    assert wrong.field == "training.fp8.first_last_layers_bf16" and "recipe=current" in str(wrong)
    assert Fp8Config(recipe="current", first_last_layers_bf16=True).core_fields()["fp8_recipe"] == "tensorwise"


@pytest.mark.parametrize("field", [{"amax_history_len": 16}, {"margin": 1}, {"wgrad": False}])
def test_fields_of_another_recipe_are_refused(field: dict[str, Any]) -> None:
    assert "belongs to training.fp8.recipe delayed" in str(refused(**field))
    assert Fp8Config.model_validate(field | {"recipe": "delayed"}).core_fields()[f"fp8_{next(iter(field))}"] == next(
        iter(field.values())
    )


def test_core_takes_every_recipe() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    for recipe in SINCE:
        fields = Fp8Config(recipe=recipe).core_fields()
        core = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=2, bf16=True, cuda_graph_scope=[],
                                 **fields)  # fmt: skip
        assert core.fp8 == "hybrid" and core.fp8_recipe == fields["fp8_recipe"]


@pytest.mark.parametrize(
    ("recipe", "capability", "cure"),
    [
        ("current", (8, 0), "training.precision=bf16"),
        ("delayed", (7, 5), "training.precision=bf16"),
        ("blockwise", (8, 9), "recipe=current"),
        ("mxfp8", (9, 0), "recipe=current"),
        ("mxfp8", (12, 0), "recipe=current"),
    ],
)
def test_a_chip_without_a_recipe_is_refused(recipe: Any, capability: tuple[int, int], cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_chip(recipe, capability)
    assert cure in str(caught.value) and f"{capability[0]}.{capability[1]}" in str(caught.value)


def test_chips_with_a_recipe_are_taken() -> None:
    for recipe, capability in (("current", (8, 9)), ("blockwise", (9, 0)), ("mxfp8", (10, 3)), ("delayed", (12, 0))):
        check_chip(recipe, capability)  # type: ignore[arg-type]


def test_layers_in_bf16() -> None:
    fp8 = Fp8Config(first_last_layers_bf16=True, num_layers_at_start_in_bf16=2)
    assert [layer for layer in range(8) if fp8.in_bf16(layer, 8)] == [0, 1, 7]
    assert not any(Fp8Config().in_bf16(layer, 8) for layer in range(8))
    check_bf16_layers(fp8, 8, 4)
    with pytest.raises(ConfigError, match="one pipeline stage, 1"):
        check_bf16_layers(fp8, 8, 8)
    with pytest.raises(ConfigError, match="leaves none of the 3 layers"):
        check_bf16_layers(fp8, 3, 1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_tensors_fill_the_range(dtype: torch.dtype) -> None:
    tensor = torch.randn(64, 32) * 1e-6
    values, undo = quantised(tensor, dtype)
    assert values.float().abs().max() == torch.finfo(dtype).max
    steps = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}[dtype]  # half the last bit, relative
    error = (values.float() * undo - tensor).abs()
    assert bool((error <= steps * tensor.abs() + 1e-3 * tensor.abs().max()).all())
    zeros, undo = quantised(torch.zeros(4, 4), dtype)
    assert not zeros.float().any() and undo.isfinite()


@pytest.mark.parametrize("least", [1e-34, 1e-38, 1e-40])
def test_values_too_small_for_any_scale_vanish(least: float) -> None:
    """As the gradients of tokens that hardly count: they must not end the run."""
    tensor = torch.zeros(16, 16, dtype=torch.bfloat16)
    tensor[0, 0] = least
    values, undo = quantised(tensor, torch.float8_e5m2)
    assert bool(values.float().isfinite().all()) and 0 < float(undo) < 1e-36
    assert float((values.float() * undo).abs().sum()) == pytest.approx(least, rel=0.2, abs=1e-42)


@pytest.mark.parametrize("turned", [False, True])
def test_quantised_matrices_lie_as_products_read_them(turned: bool) -> None:
    tensor = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    given = tensor.t().contiguous().t() if turned else tensor
    rows, columns = (quantised(given, torch.float8_e4m3fn, by_columns=wanted)[0] for wanted in (False, True))
    assert rows.stride() == (32, 1) and columns.stride() == (1, 16)
    assert torch.equal(rows.float(), columns.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values_are_not_hidden(bad: float) -> None:
    left, right = torch.randn(32, 16, dtype=torch.bfloat16), torch.randn(16, 48, dtype=torch.bfloat16)
    left[3, 4] = bad
    assert not scaled_product(left, right, FORWARD).isfinite().all()


@pytest.mark.parametrize("left_dtype", [FORWARD, BACKWARD["hybrid"]])
def test_products_of_any_strides(left_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 16, 64).bfloat16(), torch.randn(64, 48).bfloat16()
    rounding = 0.05 if left_dtype == FORWARD else 0.08  # 3 bits of mantissa, or 2, rounded in both factors
    for one, other in ((left, right), (left, right.t().contiguous().t()), (left.transpose(0, 1), right)):
        want = one.float() @ other.float()
        got = scaled_product(one, other, left_dtype)
        assert got.dtype == torch.bfloat16 and got.shape == want.shape
        assert (got.float() - want).norm() < rounding * want.norm()


def test_inside_every_matrix_product_is_scaled() -> None:
    left, right = torch.randn(32, 64).bfloat16(), torch.randn(64, 48).bfloat16()
    with _Scaled(FORWARD):
        inside = (torch.matmul(left, right), left.matmul(right))
    for product in inside:
        assert torch.equal(product, scaled_product(left, right, FORWARD))
    assert not torch.equal(torch.matmul(left, right), inside[0])


def linear_classes(layout: ParallelLayout) -> list[str]:
    """Of this stage's layers, of four: the first two and the last in BF16."""
    fp8 = Fp8Config(first_last_layers_bf16=True, num_layers_at_start_in_bf16=2)
    model = ModelConfig(num_layers=4, hidden_size=32, ffn_hidden_size=32, num_attention_heads=2)
    with ProcessGroups(layout, 1):
        core = core_config(model, layout, "fp8", TORCH, fp8=fp8)
        chunks = build_decoder_chunks(model, core, layout, 64, TORCH)
        return [type(layer.mlp.linear_fc1).__name__ for chunk in chunks for layer in chunk.decoder.layers]


def test_stages_know_which_layers_stay_in_bf16(ranks: RankPool) -> None:
    bf16, fp8 = "CpuColumnParallelLinear", "Fp8ColumnParallelLinear"
    assert ranks.run(1, linear_classes, ParallelLayout()) == [[bf16, bf16, fp8, bf16]]
    two = ParallelLayout(pipeline_model_parallel_size=2)
    assert ranks.run(2, linear_classes, two) == [[bf16, bf16], [fp8, bf16]]
