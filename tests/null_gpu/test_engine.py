"""What computes in Transformer Engine's place on the null GPU, beside plain torch on the CPU.

Runs in its environment: `ORTHANT_NULL_GPU_COMPUTE=1 scripts/null_gpu.sh run FOLDER python -m pytest tests/null_gpu`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

COMPUTES = (Path(sys.prefix) / "null_gpu.txt").exists() and bool(os.environ.get("ORTHANT_NULL_GPU_COMPUTE"))
if not COMPUTES:
    pytest.skip("needs the null GPU's environment, computing (docs/gpu.md)", allow_module_level=True)

te: Any = importlib.import_module("transformer_engine.pytorch")
tex: Any = importlib.import_module("transformer_engine_torch")
recipes: Any = importlib.import_module("transformer_engine.common.recipe")
rope: Any = importlib.import_module("transformer_engine.pytorch.attention.rope")
optimizers: Any = importlib.import_module("transformer_engine.pytorch.optimizers")
tensors: Any = importlib.import_module("transformer_engine.pytorch.tensor")

E4M3, E5M2 = tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2
TORCH_TYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
LARGEST = {E4M3: 448.0, E5M2: 57344.0}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=draw) * scale).to(dtype)


def apart(found: Tensor | None, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    assert found is not None and found.shape == expected.shape
    there = found.detach().cpu().double()
    return float((there - expected.double()).norm() / expected.double().norm())


def codes(values: Tensor, kind: Any) -> Tensor:
    """Bytes of FP8, saturated: torch's own conversion to E4M3 makes NaN of what is too large."""
    return values.clamp(-LARGEST[kind], LARGEST[kind]).to(TORCH_TYPES[kind]).view(torch.uint8)


# Casts


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_casts_by_a_scale_that_is_there(kind: Any, dtype: torch.dtype) -> None:
    values = normal(64, 48, dtype=dtype, scale=100.0)
    scale = torch.tensor([37.5])
    quantizer = tensors.Float8Quantizer(scale=scale.cuda(), amax=torch.zeros(1).cuda(), fp8_dtype=kind)
    found = quantizer(values.cuda())
    expected = codes(values.float() * scale, kind)
    assert torch.equal(found._data.cpu(), expected)
    assert torch.equal(found._transpose.cpu(), expected.t())
    assert float(quantizer.amax.cpu()) == float(values.abs().max())
    assert float(found._scale_inv.cpu()) == pytest.approx(1 / 37.5)
    assert apart(found.dequantize(), expected.view(TORCH_TYPES[kind]).float() / scale) < 1e-2


def test_every_float_becomes_the_nearest_of_fp8() -> None:
    """All of bfloat16's finite values and what lies between and beside those of FP8."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16).float()
    values = values[values.isfinite()]
    values = torch.cat([values, values * 1.0625, values * 0.9375, values * 1.0000001])
    values = values[values.isfinite()]
    values = values[: len(values) // 16 * 16].reshape(-1, 16)
    for kind in (E4M3, E5M2):
        quantizer = tensors.Float8Quantizer(scale=torch.ones(1).cuda(), amax=torch.zeros(1).cuda(), fp8_dtype=kind)
        assert torch.equal(quantizer(values.cuda())._data.cpu(), codes(values, kind))


@pytest.mark.parametrize("powers", [False, True])
def test_casts_by_the_largest_value(powers: bool) -> None:
    values = normal(32, 64, scale=3.0)
    quantizer = tensors.Float8CurrentScalingQuantizer(E4M3, device=torch.device("cuda"), force_pow_2_scales=powers)
    found = quantizer(values.cuda())
    scale = 448.0 / values.float().abs().max()
    scale = 2 ** scale.log2().floor() if powers else scale
    assert torch.equal(found._data.cpu(), codes(values.float() * scale, E4M3))
    assert torch.equal(found._transpose.cpu(), found._data.cpu().t())
    assert float(found._scale_inv.cpu()) == pytest.approx(1 / float(scale))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("shape", [(256, 384), (200, 144)])
def test_casts_by_blocks(square: bool, shape: tuple[int, int]) -> None:
    values = normal(*shape, scale=3.0)
    quantizer = tensors.Float8BlockQuantizer(
        fp8_dtype=E4M3, rowwise=True, columnwise=True, force_pow_2_scales=True, block_scaling_dim=2 if square else 1
    )
    found = quantizer(values.cuda())
    for source, data, inverses in (
        (values.float(), found._rowwise_data, found._rowwise_scale_inv),
        (values.float().t(), found._columnwise_data, found._columnwise_scale_inv),
    ):
        rows, columns = source.shape
        for top in range(0, rows, 128 if square else 1):
            for left in range(0, columns, 128):
                block = source[top : top + (128 if square else 1), left : left + 128]
                scale = 2 ** (448.0 / block.abs().max()).log2().floor()
                place = (top // 128, left // 128) if square else (left // 128, top)
                assert float(inverses.cpu()[place]) == 1 / float(scale)
                got = data.cpu()[top : top + block.shape[0], left : left + 128]
                assert torch.equal(got, codes(block * scale, E4M3))
    assert apart(found.dequantize(), values) < 0.05


def test_casts_by_blocks_as_they_are_sent() -> None:
    """Compact: both ways as the values lie, and a scale beside its block."""
    values = normal(256, 384, scale=3.0)
    quantizer = tensors.Float8BlockQuantizer(
        fp8_dtype=E4M3, rowwise=True, columnwise=True, force_pow_2_scales=True, block_scaling_dim=1,
        all_gather_usage=True,
    )  # fmt: skip
    found = quantizer(values.cuda())
    blocks = values.float().reshape(256, 3, 128)
    scales = 2 ** (448.0 / blocks.abs().amax(-1)).log2().floor()
    assert torch.equal(found._rowwise_scale_inv.cpu(), 1 / scales)
    assert torch.equal(found._rowwise_data.cpu(), codes((blocks * scales[..., None]).reshape(256, 384), E4M3))
    blocks = values.float().reshape(2, 128, 384)
    scales = 2 ** (448.0 / blocks.abs().amax(1)).log2().floor()
    assert torch.equal(found._columnwise_scale_inv.cpu(), 1 / scales)
    assert torch.equal(found._columnwise_data.cpu(), codes((blocks * scales[:, None]).reshape(256, 384), E4M3))


# Modules


def run(module: Any, values: Tensor, gradient: Tensor, recipe: Any = None) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the input."""
    inputs = values.cuda().requires_grad_()
    with te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
        output = module(inputs)
    output.backward(gradient.cuda())
    assert inputs.grad is not None
    return output.detach().cpu(), inputs.grad.cpu()


def on_cpu(module: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().float().requires_grad_() for name, tensor in module.named_parameters()}


def check(
    module: Any,
    plain: Callable[[Tensor, dict[str, Tensor]], Tensor],
    width: tuple[int, int],
    bound: float,
    recipe: Any = None,
) -> None:
    """Output and every gradient of `module` beside those of `plain`, of float32's arithmetic."""
    for name, tensor in module.named_parameters():
        with torch.no_grad():
            around = 1.0 if "layer_norm_weight" in name or (tensor.ndim == 1 and name == "weight") else 0.0
            tensor.copy_(around + normal(*tensor.shape, seed=len(name), scale=0.1, dtype=tensor.dtype).cuda())
    values, gradient = normal(4, 32, width[0]), normal(4, 32, width[1], seed=1)
    weights = on_cpu(module)
    inputs = values.float().requires_grad_()
    expected = plain(inputs, weights)
    expected.backward(gradient.float())
    for _ in range(2 if recipe else 1):  # delayed scaling has its scales from the first time
        for tensor in module.parameters():
            tensor.grad = None
        found = run(module, values, gradient, recipe)
    assert apart(found[0], expected.detach()) < bound
    assert inputs.grad is not None and apart(found[1], inputs.grad) < bound
    for name, tensor in module.named_parameters():
        grad = weights[name].grad
        assert grad is not None and apart(tensor.grad, grad) < bound, name


def rms(values: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return functional.rms_norm(values, (values.shape[-1],), weight, eps)


RECIPES = {
    "bf16": (None, 0.01),
    "current": (recipes.Float8CurrentScaling(), 0.08),
    "delayed": (recipes.DelayedScaling(amax_history_len=4), 0.08),
    "blockwise": (recipes.Float8BlockScaling(), 0.08),
}
every_recipe = pytest.mark.parametrize(("recipe", "bound"), RECIPES.values(), ids=RECIPES)
BF16: dict[str, Any] = {"params_dtype": torch.bfloat16}


@every_recipe
@pytest.mark.parametrize("bias", [False, True])
def test_linear(recipe: Any, bound: float, bias: bool) -> None:
    def plain(inputs: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return functional.linear(inputs, weights["weight"], weights.get("bias"))

    check(te.Linear(256, 384, bias=bias, **BF16), plain, (256, 384), bound, recipe)


@every_recipe
def test_norm_and_linear(recipe: Any, bound: float) -> None:
    def plain(inputs: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return functional.linear(rms(inputs, weights["layer_norm_weight"]), weights["weight"])

    module = te.LayerNormLinear(256, 384, bias=False, normalization="RMSNorm", **BF16)
    check(module, plain, (256, 384), bound, recipe)


@every_recipe
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "reglu", "srelu", "geglu", "qgelu"])
def test_norm_and_mlp(recipe: Any, bound: float, activation: str) -> None:
    def act(values: Tensor) -> Tensor:
        first, second = values.chunk(2, -1)
        return {
            "swiglu": lambda: functional.silu(first) * second,
            "reglu": lambda: functional.relu(first) * second,
            "geglu": lambda: functional.gelu(first, approximate="tanh") * second,
            "gelu": lambda: functional.gelu(values, approximate="tanh"),
            "qgelu": lambda: values * torch.sigmoid(1.702 * values),
            "srelu": lambda: functional.relu(values).square(),
        }[activation]()

    def plain(inputs: Tensor, weights: dict[str, Tensor]) -> Tensor:
        normed = functional.layer_norm(inputs, (256,), weights["layer_norm_weight"], weights["layer_norm_bias"])
        wide = functional.linear(normed, weights["fc1_weight"], weights["fc1_bias"])
        return functional.linear(act(wide), weights["fc2_weight"], weights["fc2_bias"])

    module = te.LayerNormMLP(256, 384, activation=activation, **BF16)
    jumps = 2 if activation == "reglu" else 1  # a ReLU's slope is another one where a rounding crosses 0
    check(module, plain, (256, 256), 1.6 * jumps * bound, recipe)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms(zero_centered: bool, dtype: torch.dtype) -> None:
    shift = float(zero_centered)
    bound = 0.01 if dtype == torch.bfloat16 else 1e-5

    def layer_norm(inputs: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return functional.layer_norm(inputs, (256,), weights["weight"] + shift, weights["bias"])

    options: dict[str, Any] = {"zero_centered_gamma": zero_centered, "dtype": dtype, "device": "cuda"}
    bf16 = te.RMSNorm(256, **options)
    check(bf16, lambda inputs, weights: rms(inputs, weights["weight"] + shift), (256, 256), 0.01)
    check(te.LayerNorm(256, **options), layer_norm, (256, 256), max(bound, 0.01))


def test_gradients_are_added_to_main_gradients() -> None:
    module = te.Linear(256, 384, bias=False, fuse_wgrad_accumulation=True, **BF16)
    before = normal(384, 256, seed=5, dtype=torch.float32)
    module.weight.main_grad = before.cuda()
    values, gradient = normal(64, 256), normal(64, 384, seed=1)
    run(module, values, gradient)
    expected = before + gradient.float().t() @ values.float()
    assert apart(module.weight.main_grad, expected) < 1e-6


@pytest.mark.parametrize(("told", "least", "most"), [(None, 1e-5, 1e-3), ("0", 0.0, 1e-6)], ids=["tf32", "float32"])
def test_products_of_float32(told: str | None, least: float, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS may take TF32's precision, unless its own switch is off."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if told is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", told)
    module = te.Linear(256, 384, bias=False, params_dtype=torch.float32)
    values = normal(64, 256, dtype=torch.float32)
    found = module(values.cuda())
    assert least <= apart(found, values @ module.weight.detach().cpu().t()) < most


# Rotary embeddings


def rotated(values: Tensor, freqs: Tensor, interleaved: bool) -> Tensor:
    """[s, b, h, d] by angles [s, 1, 1, turned]."""
    turned = freqs.shape[-1]
    first, rest = values[..., :turned], values[..., turned:]
    if interleaved:
        half = torch.stack((-first[..., 1::2], first[..., ::2]), -1).flatten(-2)
    else:
        half = torch.cat((-first[..., turned // 2 :], first[..., : turned // 2]), -1)
    return torch.cat((first * freqs.cos() + half * freqs.sin(), rest), -1)


def angles(length: int, turned: int, interleaved: bool) -> Tensor:
    steps = torch.outer(torch.arange(length).float(), 0.3 ** torch.arange(turned // 2))
    doubled = steps.repeat_interleave(2, -1) if interleaved else torch.cat((steps, steps), -1)
    return doubled[:, None, None]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [32, 16])
@pytest.mark.parametrize("layout", ["sbhd", "bshd", "thd"])
def test_rotary_embeddings(interleaved: bool, turned: int, layout: str) -> None:
    freqs = angles(24, turned, interleaved)
    values, gradient = (normal(24, 2, 3, 32, seed=seed, dtype=torch.float32) for seed in (0, 1))
    inputs = values.clone().requires_grad_()
    rotated(inputs, freqs, interleaved).backward(gradient)
    assert inputs.grad is not None

    def laid(tensor: Tensor) -> Tensor:
        if layout == "sbhd":
            return tensor
        batched = tensor.transpose(0, 1).contiguous()
        return batched if layout == "bshd" else batched.flatten(0, 1)

    bounds = torch.tensor([0, 24, 48], dtype=torch.int32).cuda() if layout == "thd" else None
    on_card = laid(values).cuda().requires_grad_()
    found = rope.apply_rotary_pos_emb(
        on_card, freqs.cuda(), layout, interleaved=interleaved, fused=True, cu_seqlens=bounds
    )
    found.backward(laid(gradient).cuda())
    assert apart(found, laid(inputs.detach()) * 0 + laid(rotated(values, freqs, interleaved))) < 1e-6
    assert apart(on_card.grad, laid(inputs.grad)) < 1e-6


@pytest.mark.parametrize("layout", ["sbhd", "thd"])
def test_rotary_embeddings_of_ranks(layout: str) -> None:
    """Of 2 ranks each has a chunk from the front and its mirror from the back."""
    freqs = angles(32, 32, False)
    values = normal(32, 1, 3, 32, dtype=torch.float32)
    chunks, expected = values.chunk(4), rotated(values, freqs, False).chunk(4)
    for rank in range(2):
        mine = torch.cat((chunks[rank], chunks[3 - rank]))
        packed = layout == "thd"
        bounds = torch.tensor([0, 32], dtype=torch.int32).cuda() if packed else None
        found = rope.apply_rotary_pos_emb(
            (mine[:, 0] if packed else mine).cuda(), freqs.cuda(), layout, fused=True, cu_seqlens=bounds,
            cp_size=2, cp_rank=rank,
        )  # fmt: skip
        assert apart(found.reshape(16, 1, 3, 32), torch.cat((expected[rank], expected[3 - rank]))) < 1e-6


def test_angles_that_are_not_there_are_refused() -> None:
    with pytest.raises(RuntimeError, match="angles for 16 positions and is asked for 16"):
        rope.apply_rotary_pos_emb(
            normal(24, 3, 32).cuda(), angles(16, 32, False).cuda(), "thd", fused=True, cp_size=2, cp_rank=1,
            cu_seqlens=torch.tensor([0, 48], dtype=torch.int32).cuda(),
        )  # fmt: skip


# Optimizers


@pytest.mark.parametrize("options", [{}, {"adam_w_mode": False}, {"master_weights": True}, {"capturable": True},
                                     {"master_weights": True, "store_param_remainders": True}],
                         ids=["adamw", "l2", "master", "capturable", "remainders"])  # fmt: skip
def test_adam(options: dict[str, Any]) -> None:
    low = bool(options.get("master_weights"))
    start = normal(300, 40, dtype=torch.float32)
    mine = torch.nn.Parameter(start.to(torch.bfloat16 if low else torch.float32).cuda())
    theirs = torch.nn.Parameter(mine.detach().cpu().float())
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours = optimizers.FusedAdam([mine], **settings, **options)
    kind = torch.optim.Adam if options.get("adam_w_mode") is False else torch.optim.AdamW
    plain = kind([theirs], **settings)
    for step in range(5):
        gradient = normal(300, 40, seed=step + 1, dtype=mine.dtype)
        mine.grad, theirs.grad = gradient.cuda(), gradient.float()
        ours.step()
        plain.step()
    if low:
        assert apart(mine, theirs.detach()) < 3e-3
        master = ours.get_unscaled_state(mine, "master_param").cpu()
        if master.dtype == torch.int16:  # the 16 bits behind bfloat16's, which was rounded up where they are negative
            high = mine.detach().cpu().view(torch.int16).int() - (master < 0).int()
            master = (high * 2**16 + (master.int() & 0xFFFF)).view(torch.float32)
        assert apart(master, theirs.detach()) < 1e-5
    else:
        assert apart(mine, theirs.detach()) < 1e-6


def test_norms_of_many_tensors() -> None:
    values = [normal(33, 7, seed=seed, dtype=torch.float32) for seed in range(3)]
    on_card = [tensor.cuda() for tensor in values]
    flag = torch.zeros(1, dtype=torch.int).cuda()
    whole, each = optimizers.multi_tensor_applier(tex.multi_tensor_l2norm, flag, [on_card], True)
    assert float(whole.cpu()) == pytest.approx(float(torch.cat(values).norm()), rel=1e-6)
    assert each.cpu().tolist() == pytest.approx([float(tensor.norm()) for tensor in values], rel=1e-6)
    halves = [torch.empty_like(tensor) for tensor in on_card]
    optimizers.multi_tensor_applier(tex.multi_tensor_scale, flag, [on_card, halves], 0.5)
    assert all(torch.equal(half.cpu(), tensor / 2) for half, tensor in zip(halves, values, strict=True))
    assert not int(flag.cpu())
    on_card[1][3, 3] = float("inf")
    optimizers.multi_tensor_applier(tex.multi_tensor_l2norm, flag, [on_card], False)
    assert int(flag.cpu()) == 1


def test_delayed_scales() -> None:
    """Histories move on by one; the scale is the largest that FP8 holds over the largest of them."""
    history = torch.tensor([[3.0, 0.0], [1.0, 5.0], [8.0, 2.0]]).cuda()
    scale = torch.tensor([1.0, 7.0]).cuda()
    reduced = torch.tensor([4.0, 0.0]).cuda()
    tex.fused_amax_and_scale_update_after_reduction(reduced, [history], [scale], "max", E4M3, 0.0)
    assert history.cpu().tolist() == [[0.0, 0.0], [8.0, 5.0], [4.0, 2.0]]
    assert scale.cpu().tolist() == [448.0 / 8.0, 7.0]
