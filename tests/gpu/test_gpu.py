"""A GPU against a CPU, and libraries of kernels against each other. `make test-gpu` runs all of this."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from foundation.libraries import transformer_engine_version
from launch.machine import gpu_present
from tests.gpu.cases import apart, worst
from tests.gpu.worker import ROOT, side
from tests.training.parity_cases import OTHER_ROUNDINGS
from tests.training.trainer_cases import write_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(2000),  # a card needs seconds; what stands in for one computes on a CPU
    pytest.mark.skipif(not gpu_present(), reason="needs an NVIDIA GPU, and this machine has none"),
]
needs_engine = pytest.mark.skipif(transformer_engine_version() is None, reason="needs Transformer Engine")
ENGINE = pytest.param("transformer_engine", marks=needs_engine)


@cache
def plain_steps(device: str, kernels: str, precision: str = "bf16") -> Any:
    """Two steps, run once however many tests compare with them."""
    return side(device, "steps", kernels, precision)


@cache
def losses(kernels: str, precision: str, recipe: str = "current") -> list[float]:
    """Of 200 steps on the GPU."""
    found: list[float] = side("cuda", "steps", kernels, precision, recipe=recipe, count=200, rows=4)["losses"]
    return found


@pytest.mark.parametrize("kernels", ["torch", ENGINE])
def test_a_gpu_computes_what_a_cpu_computes(kernels: str) -> None:
    found, on_cpu = plain_steps("cuda", kernels), plain_steps("cpu", "torch")
    for one, other in zip(found["losses"], on_cpu["losses"], strict=True):
        assert one == pytest.approx(other, rel=OTHER_ROUNDINGS.loss)
    assert worst(found["gradients"], on_cpu["gradients"]) < (OTHER_ROUNDINGS.gradient, "")


def test_in_fp32_a_gpu_is_as_near_as_its_products() -> None:
    """Without tf32: products and sums of fp32, in another order."""
    found, expected = (plain_steps(device, "torch", "fp32") for device in ("cuda", "cpu"))
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert worst(found["gradients"], expected["gradients"]) < (1e-3, "")


@needs_engine
@pytest.mark.parametrize(
    "overrides",
    [{}, {"attention": "torch"}, {"linear": "torch"}, {"norm": "torch", "swiglu": "torch", "rope": "torch"},
     {"adam": "torch", "l2norm": "torch", "weight_gradient": "torch"}],
    ids=["all", "attention", "linear", "elementwise", "optimizer"],
)  # fmt: skip
def test_transformer_engine_beside_torch(overrides: dict[str, str]) -> None:
    torchs = plain_steps("cuda", "torch")
    mixed = side("cuda", "steps", "transformer_engine", "bf16", overrides=overrides)
    assert mixed["losses"] == pytest.approx(torchs["losses"], rel=OTHER_ROUNDINGS.loss)
    assert worst(mixed["gradients"], torchs["gradients"]) < (OTHER_ROUNDINGS.gradient, "")


@pytest.mark.parametrize(
    ("kernels", "recipe"),
    [("torch", "current"), *(pytest.param("transformer_engine", recipe, marks=needs_engine)
                             for recipe in ("current", "delayed", "blockwise"))],
)  # fmt: skip
def test_fp8_learns_as_bf16_does(kernels: str, recipe: str) -> None:
    """200 steps: means of 20 losses within 1 %."""
    from launch.commands.against import compare

    bf16, fp8 = losses(kernels, "bf16"), losses(kernels, "fp8", recipe)
    assert bf16[-1] < 0.6 * bf16[0]
    found = compare(fp8, bf16)
    assert found.largest <= 0.01, found


@needs_engine
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_checkpoint_of_fp8_goes_to_a_cpu_and_back(tmp_path: Path, recipe: str) -> None:
    corpus, run = str(write_corpus(tmp_path)), str(tmp_path / "run")
    side("cuda", "trained", run, corpus, "transformer_engine", "fp8", recipe=recipe, until=3)
    there = side("cuda", "logits", run, corpus, "transformer_engine", "bf16", step=3)
    here = side("cpu", "logits", run, corpus, "torch", "bf16", step=3)
    assert apart(here, there) < OTHER_ROUNDINGS.gradient
    side("cpu", "trained", run, corpus, "torch", "bf16", until=5)
    here = side("cpu", "logits", run, corpus, "torch", "bf16", step=5)
    back = side("cuda", "logits", run, corpus, "transformer_engine", "bf16", step=5)
    assert apart(back, here) < OTHER_ROUNDINGS.gradient
    side("cuda", "trained", run, corpus, "transformer_engine", "fp8", recipe=recipe, until=7)


def test_gradients_added_inside_products() -> None:
    """cuBLAS writes into the matrix that it adds to (addmm with out_dtype, out=self)."""
    from model.kernels.weight_gradient import wgrad_gemm_accum_fp32

    draw = torch.Generator("cuda").manual_seed(0)
    inputs, grad = (torch.randn(512, 256, generator=draw, device="cuda").bfloat16() for _ in range(2))
    main = torch.randn(256, 256, generator=draw, device="cuda")
    expected = main.double() + grad.double().t() @ inputs.double()
    wgrad_gemm_accum_fp32(inputs, grad, main)
    assert apart(main.cpu(), expected.cpu()) < 1e-5


def test_kernels_that_are_compiled() -> None:
    from model.kernels.activation import plain_swiglu, swiglu
    from model.kernels.rotation import plain_rotated, rotated

    draw = torch.Generator("cuda").manual_seed(0)
    wide = torch.randn(64, 2, 512, generator=draw, device="cuda", requires_grad=True)
    heads = torch.randn(64, 2, 4, 32, generator=draw, device="cuda", requires_grad=True)
    angles = torch.randn(64, 1, 1, 16, generator=draw, device="cuda").repeat(1, 1, 1, 2)
    for got, plain, tensor in (
        (swiglu(wide), plain_swiglu(wide), wide),
        (rotated(heads, angles), plain_rotated(heads, angles), heads),
    ):
        assert apart(got.detach().cpu(), plain.detach().cpu()) < 1e-5
        grads = [torch.autograd.grad(out.square().sum(), tensor)[0].cpu() for out in (got, plain)]
        assert apart(*grads) < 1e-5


def test_attention_by_cudnn_or_flash() -> None:
    from torch.nn.functional import scaled_dot_product_attention as attend

    from model.kernels.on_gpu import fused_attention

    draw = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(2, 8, 512, 128, generator=draw, device="cuda")
    key, value = (torch.randn(2, 4, 512, 128, generator=draw, device="cuda") for _ in range(2))
    with fused_attention(query):
        got = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), is_causal=True, enable_gqa=True)
    expected = attend(query.cpu(), key.cpu(), value.cpu(), is_causal=True, enable_gqa=True)
    assert apart(got.float().cpu(), expected) < 1e-2


def test_cross_entropy_of_a_large_vocabulary() -> None:
    from model.kernels.cross_entropy import vocab_parallel_cross_entropy

    draw = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(2048, 128256, generator=draw, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(0, 128000, (2048,), generator=draw, device="cuda")
    loss = vocab_parallel_cross_entropy(logits, labels, 128000, None)
    expected = torch.nn.functional.cross_entropy(logits.detach()[:64, :128000].float().cpu(), labels[:64].cpu(),
                                                 reduction="none")  # fmt: skip
    assert apart(loss.detach()[:64].cpu(), expected) < 1e-4
    loss.sum().backward()
    assert logits.grad is not None and not logits.grad[:, 128000:].any()
    assert float(logits.grad.float().sum().abs()) < 1.0  # each row's adds up to 0, but for its roundings


def test_the_doctor_finds_nothing_broken() -> None:
    command = [sys.executable, "-m", "launch", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    findings = json.loads(done.stdout)["findings"]
    about = [one for one in findings if one["group"] in ("GPU", "kernels")]
    assert about and not [one for one in about if one["status"] == "broken"], about


def test_every_line_of_the_benchmark_runs(tmp_path: Path) -> None:
    if importlib.util.find_spec("benchmarks.gpu") is None:
        pytest.fail("benchmarks/gpu.py is gone")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(tmp_path.glob("*.json"))
