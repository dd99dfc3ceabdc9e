"""The plain form of a layer beside core's own, and when it stands for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp

from model.config import ModelConfig
from model.generation.engine import GenerationEngine, host_groups
from model.generation.plain_layer import PlainLayer, can_be_plain, rotation
from model.generation.settings import Completion, Prompt, SamplingSettings
from parallel.layout import ParallelLayout
from tests.model.generation.cases import CONTEXT, LAYOUTS, MODELS, Tensors, built, decoder_on, some_prompts, weights_of
from tests.ranks import RankPool

YARN = {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}


def plain_and_core(
    weights: Tensors, model: ModelConfig, grid: ParallelLayout, prompts: Sequence[Prompt], settings: SamplingSettings
) -> tuple[list[bool], list[Completion], list[Completion]]:
    """Which layers are plain, what they write, and what core's write."""
    with decoder_on(weights, model, grid) as decoder:
        engine = GenerationEngine(decoder, grid, CONTEXT, host_groups(grid))
        layers: Any = engine._cached
        are_plain = [plain is not None for plain in layers._plain]
        found = engine.generate(prompts, settings, 5)
        layers._plain = [None] * len(are_plain)
        return are_plain, found, engine.generate(prompts, settings, 5)


@pytest.mark.parametrize(
    ("family", "where"), [*((family, "one") for family in [*MODELS, "yarn"]), ("llama", "tp2_pp2"), ("qwen3", "tp2")]
)
def test_a_plain_layer_gives_the_bits_of_cores(ranks: RankPool, family: str, where: str) -> None:
    model, reference = built("llama" if family == "yarn" else family)
    weights, grid = weights_of(reference, model), LAYOUTS[where]
    if family == "yarn":
        model = ModelConfig.model_validate(model.model_dump() | YARN)
    settings = SamplingSettings(max_new_tokens=8, seed=2)
    for even in (True, False):
        prompts = some_prompts(10, shortest=9, longest=9 if even else 20)
        for are_plain, plain, core in ranks.run(
            grid.world_size, plain_and_core, weights, model, grid, prompts, settings
        ):
            assert all(are_plain) and plain == core


@pytest.mark.parametrize("where", ["tp2_sp", "tp4"])
def test_other_layers_stay_cores(ranks: RankPool, where: str) -> None:
    model, reference = built("llama")
    grid, settings = LAYOUTS[where], SamplingSettings(max_new_tokens=2)
    found = ranks.run(
        grid.world_size, plain_and_core, weights_of(reference, model), model, grid, some_prompts(2), settings
    )
    assert not any(any(are_plain) for are_plain, _, _ in found)


class _Engines(torch.nn.Module):
    """As Transformer Engine's linear layers hold their weights; without the library, which needs a GPU."""

    __module__ = "megatron.core.extensions.transformer_engine"

    def __init__(self, linear: Any, norm: Any = None) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, torch.empty(0) if linear.bias is None else linear.bias
        if norm is not None:
            self.layer_norm_weight, self.eps = norm.weight, norm.eps


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_layers_of_transformer_engine_are_plain_too(ranks: RankPool, family: str) -> None:
    model, reference = built(family)
    ((torchs, engines),) = ranks.run(1, torchs_and_engines, weights_of(reference, model), model)
    assert torch.equal(torchs, engines)


def torchs_and_engines(weights: Tensors, model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer makes of the same tokens, its weights in torch's modules and in the engine's."""
    with decoder_on(weights, model, ParallelLayout()) as decoder, torch.no_grad():
        layer: Any = decoder.decoder.layers[0]
        draw = torch.Generator().manual_seed(1)
        hidden = torch.randn(5, 1, model.hidden_size, generator=draw)
        angles = torch.randn(5, 1, 1, model.head_width // 2, generator=draw).repeat(1, 1, 1, 2)
        found = []
        for engines in (False, True):
            if engines:
                attention, mlp = layer.self_attention, layer.mlp
                attention.linear_qkv = _Engines(attention.linear_qkv, layer.input_layernorm)
                attention.linear_proj = _Engines(attention.linear_proj)
                mlp.linear_fc1 = _Engines(mlp.linear_fc1, layer.pre_mlp_layernorm)
                mlp.linear_fc2 = _Engines(mlp.linear_fc2)
                layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp()
            assert can_be_plain(layer)
            plain = PlainLayer(layer, lambda query, *_: query.flatten(1), lambda one: rotation(one, 1.0, hidden.dtype))
            found.append(plain(hidden, angles)[0])
        return found[0], found[1]


def test_layers_that_wait_for_weights_stay_cores(ranks: RankPool) -> None:
    model, reference = built("llama")
    called, still = ranks.run(1, calls_of_a_hooked_layer, weights_of(reference, model), model)[0]
    assert called > 0 and still, "the hook has to run, and the layer's own forward has to be back"


def calls_of_a_hooked_layer(weights: Tensors, model: ModelConfig) -> tuple[int, bool]:
    calls: list[int] = []
    with decoder_on(weights, model, ParallelLayout()) as decoder:
        layers: Any = decoder.decoder.layers
        layers[0].self_attention.linear_qkv.register_forward_pre_hook(lambda *_: calls.append(1))
        engine = GenerationEngine(decoder, ParallelLayout(), CONTEXT)
        engine.generate(some_prompts(2), SamplingSettings(max_new_tokens=2))
        return len(calls), all("forward" not in vars(layer) for layer in layers)


def test_steps_of_a_model_that_trains_in_fp8_are_in_bf16(ranks: RankPool) -> None:
    model, reference = built("llama")
    ((seen, after),) = ranks.run(1, fp8_in_steps, weights_of(reference, model), model)
    assert seen == [None] * len(seen) != [] and after == "hybrid"


def fp8_in_steps(weights: Tensors, model: ModelConfig) -> tuple[list[str | None], str | None]:
    """What core's block reads while tokens are written, and what it has afterwards."""
    seen: list[str | None] = []
    with decoder_on(weights, model, ParallelLayout()) as decoder:
        block: Any = decoder.decoder
        block.config.fp8 = "hybrid"
        block.layers[0].self_attention.linear_qkv.register_forward_pre_hook(lambda *_: seen.append(block.config.fp8))
        engine = GenerationEngine(decoder, ParallelLayout(), CONTEXT)
        engine.generate(some_prompts(2), SamplingSettings(max_new_tokens=2))
        return seen, block.config.fp8
