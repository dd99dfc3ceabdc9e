"""Names of core that follow the choice of kernels, with stubs in the place of libraries that are not here."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import optimizer
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as core_optimizer
from megatron.core.tensor_parallel import layers

from model.kernels import weight_gradient
from model.kernels.bind import bind_to_core
from model.kernels.choice import TORCH, KernelChoice
from model.kernels.norm import ApexRMSNorm, RMSNorm
from model.kernels.rotation import plain_rotated, rotated, transformer_engine_where_shared
from parallel.fused_adam import FusedAdam

REBOUND: list[tuple[Any, tuple[str, ...]]] = [
    (optimizer, ("Adam", "USING_PYTORCH_OPTIMIZER")),
    (distrib_optimizer, ("Adam", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER", "USING_TE_OPTIMIZER")),
    (clip_grads, ("multi_tensor_applier", "l2_norm_impl", "multi_tensor_scale_impl")),
    (core_optimizer, ("multi_tensor_applier", "multi_tensor_scale_impl")),
    (rope_utils, ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")),
    (layers, ("fused_weight_gradient_mlp_cuda", "_grad_accum_fusion_available")),
]


@pytest.fixture(autouse=True)
def names_of_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards as they were before the test."""
    for holder, names in REBOUND:
        for name in names:
            monkeypatch.setattr(holder, name, getattr(holder, name, None), raising=False)


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **holds: Any) -> None:
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        path = ".".join(parts[:length])
        monkeypatch.setitem(sys.modules, path, sys.modules.get(path) or ModuleType(path))
    for key, value in holds.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def test_torch_everywhere() -> None:
    bind_to_core(TORCH)
    assert optimizer.Adam is distrib_optimizer.Adam is FusedAdam
    assert rope_utils.fused_apply_rotary_pos_emb is rotated
    bind_to_core(KernelChoice(weight_gradient="torch"))
    assert layers.fused_weight_gradient_mlp_cuda is weight_gradient and layers._grad_accum_fusion_available


def test_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "apex.optimizers", FusedAdam="apex's adam")
    stub(monkeypatch, "apex.multi_tensor_apply", multi_tensor_applier="applier")
    stub(monkeypatch, "amp_C", multi_tensor_l2norm="norm", multi_tensor_scale="scale")
    stub(monkeypatch, "fused_weight_gradient_mlp_cuda")
    bind_to_core(KernelChoice(adam="apex", l2norm="apex", weight_gradient="apex"))
    assert optimizer.Adam == distrib_optimizer.Adam == "apex's adam" and distrib_optimizer.USING_APEX_OPTIMIZER
    assert (clip_grads.multi_tensor_applier, clip_grads.l2_norm_impl) == ("applier", "norm")
    assert layers.fused_weight_gradient_mlp_cuda is sys.modules["fused_weight_gradient_mlp_cuda"]
    bind_to_core(TORCH)  # and back
    assert optimizer.Adam is FusedAdam and clip_grads.l2_norm_impl != "norm"


def test_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "transformer_engine.pytorch.optimizers", FusedAdam="its adam", multi_tensor_applier="applier",
         multi_tensor_l2norm="norm", multi_tensor_scale="scale")  # fmt: skip
    bind_to_core(KernelChoice(adam="transformer_engine", l2norm="transformer_engine"))
    assert optimizer.Adam == "its adam" and distrib_optimizer.USING_TE_OPTIMIZER
    assert not distrib_optimizer.USING_APEX_OPTIMIZER
    assert clip_grads.multi_tensor_scale_impl == core_optimizer.multi_tensor_scale_impl == "scale"


def test_norm_and_scale_of_many_tensors() -> None:
    bind_to_core(TORCH)
    tensors = [torch.randn(7, 3), torch.randn(5), torch.zeros(0)]
    want = torch.cat([tensor.flatten() for tensor in tensors]).norm()
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, torch.zeros(1), [tensors], False)
    torch.testing.assert_close(norm, want.view(1))
    halves = [tensor / 2 for tensor in tensors]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    for target in (copies, tensors):  # into others, and in place
        clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, torch.zeros(1), [tensors, target], 0.5)
        for got, half in zip(target, halves, strict=True):
            assert torch.equal(got, half)


def test_transformer_engine_turns_rows_that_share_their_positions() -> None:
    engine = SimpleNamespace(fused_apply_rotary_pos_emb=lambda heads, angles, interleaved: -heads)
    transformer_engine_where_shared(engine)
    heads, angles = torch.randn(4, 2, 3, 8), torch.randn(4, 1, 1, 4).repeat(1, 1, 1, 2)
    assert torch.equal(rope_utils.fused_apply_rotary_pos_emb(heads, angles, interleaved=False), -heads)
    own = angles.repeat(1, 2, 1, 1)
    assert torch.equal(rope_utils.fused_apply_rotary_pos_emb(heads, own, interleaved=False), rotated(heads, own))


def test_what_a_compiler_gets_is_the_same_rotation() -> None:
    heads, angles = torch.randn(4, 2, 3, 8), torch.randn(4, 1, 1, 4).repeat(1, 1, 1, 2)
    torch.testing.assert_close(plain_rotated(heads, angles), rotated(heads, angles))


def test_apex_norm_is_called_as_apex_defines_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def fused(hidden: Any, weight: Any, shape: Any, eps: Any) -> Any:
        calls.append((shape, eps))
        return torch.nn.functional.rms_norm(hidden, shape, weight, eps)

    stub(monkeypatch, "apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused)
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True)
    hidden = torch.randn(3, 16)
    norm = ApexRMSNorm(config, 16, eps=1e-6)
    assert torch.equal(norm(hidden), RMSNorm(config, 16, eps=1e-6)(hidden)) and calls == [((16,), 1e-6)]
    assert norm.weight.sequence_parallel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accumulated_weight_gradients(dtype: torch.dtype) -> None:
    inputs, grad = torch.randn(6, 5).to(dtype), torch.randn(6, 4).to(dtype)
    main = torch.randn(4, 5)
    want = main.double() + grad.double().t() @ inputs.double()
    weight_gradient.wgrad_gemm_accum_fp32(inputs, grad, main)
    torch.testing.assert_close(main.double(), want, rtol=1e-5, atol=1e-5)


def test_accumulated_in_the_factors_own_precision() -> None:
    inputs, grad, main = (torch.randn(*shape).bfloat16() for shape in ((6, 5), (6, 4), (4, 5)))
    want = main.float() + grad.float().t() @ inputs.float()
    weight_gradient.wgrad_gemm_accum_fp16(inputs, grad, main)
    torch.testing.assert_close(main.float(), want, rtol=2e-2, atol=6e-2)
