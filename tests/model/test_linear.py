"""Products on a CPU: the values of torch.matmul whatever the strides, and oneDNN where it is meant to be."""

from __future__ import annotations

import pytest
import torch

from model.kernels import linear
from model.kernels.linear import CpuColumnParallelLinear, CpuRowParallelLinear, product
from tests.ranks import RankPool


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_matmul(rows: int, dtype: torch.dtype) -> None:
    left, right = torch.randn(rows, 24).to(dtype), torch.randn(24, 40).to(dtype)
    for a, b in ((left, right), (left, right.t().contiguous().t()), (left.t().contiguous().t(), right)):
        torch.testing.assert_close(product(a, b), torch.matmul(a, b))
    stacked = left.view(rows, 1, 24)
    assert product(stacked, right).shape == (rows, 1, 40)
    torch.testing.assert_close(product(stacked, right), torch.matmul(stacked, right))


def test_a_matrix_with_gaps_between_its_rows_is_closed_up_first() -> None:
    """oneDNN takes such a one too, a thousand times slower."""
    left, wide = torch.randn(64, 24), torch.randn(40, 100)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiled:
        for right in (wide[:, :24].t(), wide[:24, :40]):
            torch.testing.assert_close(product(left, right), left @ right)
    assert sum(event.name == "aten::contiguous" for event in profiled.events()) >= 2


def test_small_products_and_other_precisions_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "FEWEST_ROWS", 100)
    for rows, dtype, by_onednn in ((99, torch.float32, 0), (200, torch.float64, 0), (100, torch.float32, 1)):
        left, right = torch.randn(rows, 8, dtype=dtype), torch.randn(8, 8, dtype=dtype)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            found = product(left, right)
        torch.testing.assert_close(found, torch.matmul(left, right))
        assert sum(event.name == "mkldnn::_linear_pointwise" for event in profiled.events()) == by_onednn


def gradients() -> list[tuple[list[torch.Tensor], int]]:
    """(output and gradients, products by oneDNN) of a column- and a row-parallel layer by core's class and by ours."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from parallel.groups import ProcessGroups
    from parallel.layout import ParallelLayout

    found = []
    with ProcessGroups(ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True), seed=1):
        config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, sequence_parallel=True,
                                   tensor_model_parallel_size=2, use_cpu_initialization=True,
                                   cuda_graph_scope=[])  # fmt: skip
        for column, row in ((ColumnParallelLinear, RowParallelLinear), (CpuColumnParallelLinear, CpuRowParallelLinear)):
            torch.manual_seed(0)
            options = {"config": config, "init_method": torch.nn.init.normal_, "bias": False, "skip_bias_add": False}
            first = column(32, 48, gather_output=False, **options)
            second = row(48, 32, input_is_parallel=True, **options)
            tokens = torch.randn(8, 2, 32, requires_grad=True)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
                out = second(first(tokens)[0])[0]
                out.square().sum().backward()
            calls = sum("mkldnn::_linear_pointwise" in event.name for event in profiled.events())
            tensors = [out.detach(), tokens.grad, first.weight.grad, second.weight.grad]
            found.append(([tensor for tensor in tensors if tensor is not None], calls))
    return found


def test_layers_give_core_s_outputs_and_gradients(ranks: RankPool) -> None:
    for (core, none), (ours, six) in ranks.run(2, gradients):
        assert len(core) == len(ours) == 4 and (none, six) == (0, 6)
        for expected, tensor in zip(core, ours, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=2e-5, atol=2e-5)
