"""Parameter and FLOP counts against published totals and against transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest

from model.config import ModelConfig
from model.counts import active_parameter_count, attended_tokens, flops_per_token, parameter_count
from model.presets import DEMO_VOCABULARIES, PRESETS

PUBLISHED_BILLIONS = {
    "llama2_7b": 6.74,
    "llama2_13b": 13.02,
    "llama2_70b": 68.98,
    "llama3_8b": 8.03,
    "llama3_70b": 70.55,
    "llama3_1_8b": 8.03,
    "llama3_1_70b": 70.55,
    "llama3_1_405b": 405.85,
    "mistral_7b_v0_1": 7.24,
    "mistral_7b_v0_3": 7.25,
    "qwen2_5_0_5b": 0.49,
    "qwen2_5_1_5b": 1.54,
    "qwen2_5_7b": 7.62,
    "qwen2_5_72b": 72.71,
    "qwen3_0_6b": 0.60,
    "qwen3_8b": 8.19,
    "qwen3_32b": 32.76,
    "mixtral_8x7b": 46.70,
    "mixtral_8x22b": 140.63,
    "qwen3_30b_a3b": 30.53,
    "qwen3_235b_a22b": 235.09,
}
ACTIVE_BILLIONS = {"mixtral_8x7b": 12.88, "mixtral_8x22b": 39.16, "qwen3_30b_a3b": 3.35, "qwen3_235b_a22b": 22.19}
"""Mixtral's papers say 12.9 and 39, Qwen's names 3 and 22."""


def test_every_published_preset_has_a_published_total() -> None:
    assert set(PUBLISHED_BILLIONS) == {name for name in PRESETS if not name.startswith("demo_")}


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_totals_are_the_published_ones(name: str) -> None:
    billions = parameter_count(ModelConfig.from_preset(name)) / 1e9
    assert billions == pytest.approx(PUBLISHED_BILLIONS[name], abs=0.0051)


@pytest.mark.parametrize(("name", "millions"), [("demo_3m", 3), ("demo_20m", 20), ("demo_110m", 110)])
def test_demo_models_are_as_large_as_their_names_say(name: str, millions: int) -> None:
    count = parameter_count(ModelConfig.from_preset(name), vocab_size=DEMO_VOCABULARIES[name])
    assert count / 1e6 == pytest.approx(millions, rel=0.1)


def transformers_model(config: ModelConfig) -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    family = "llama"
    if config.num_experts is not None:
        family = "qwen3_moe" if config.qk_layernorm else "mixtral"
    elif config.add_qkv_bias:
        family = "qwen2"
    elif config.qk_layernorm:
        family = "qwen3"
    elif config.preset is not None and config.preset.startswith("mistral"):
        family = "mistral"
    settings = transformers.AutoConfig.for_model(
        family,
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.query_groups,
        head_dim=config.head_width,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.share_embeddings_and_output_weights,
        **({} if config.num_experts is None else experts_for_transformers(config)),
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(settings)


def experts_for_transformers(config: ModelConfig) -> dict[str, Any]:
    own = {"num_experts": config.num_experts, "moe_intermediate_size": config.block_width}
    return {"num_experts_per_tok": config.moe_router_topk, **(own if config.qk_layernorm else
            {"num_local_experts": config.num_experts})}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVE_BILLIONS)
def test_experts_that_a_token_does_not_go_to_are_not_active(name: str) -> None:
    config = ModelConfig.from_preset(name)
    assert active_parameter_count(config) / 1e9 == pytest.approx(ACTIVE_BILLIONS[name], abs=0.0051)
    only_active = config.model_copy(update={"num_experts": config.moe_router_topk})
    router = config.num_layers * config.hidden_size * (config.num_experts - config.moe_router_topk)
    assert active_parameter_count(config) == parameter_count(only_active) + router
    # A token's products are those of its experts alone: six operations a parameter that multiplies.
    products = 6 * (active_parameter_count(config) - config.hidden_size * (config.vocab_size or 0))
    assert flops_per_token(config, 1) == pytest.approx(products, rel=1e-3)


@pytest.mark.parametrize("name", ["llama3_8b", "qwen3_0_6b"])
def test_without_experts_all_parameters_are_active(name: str) -> None:
    config = ModelConfig.from_preset(name)
    assert active_parameter_count(config) == parameter_count(config)


@pytest.mark.parametrize("name", PUBLISHED_BILLIONS)
def test_counts_equal_those_of_transformers_on_the_meta_device(name: str) -> None:
    config = ModelConfig.from_preset(name)
    theirs = sum(parameter.numel() for parameter in transformers_model(config).parameters())
    assert parameter_count(config) == theirs


def test_causal_attention_is_half_of_full_attention() -> None:
    config = ModelConfig.from_preset("llama3_8b")
    assert attended_tokens(config, 8192, "full") == 8192
    assert attended_tokens(config, 8192, "causal") == 4096
    # 3 passes x 4 x heads x width x half the sequence, per layer.
    gap = flops_per_token(config, 8192, "full") - flops_per_token(config, 8192, "causal")
    assert gap == 3 * 4 * 32 * 128 * 4096 * 32


def test_a_short_sequence_costs_six_times_the_parameters_that_multiply() -> None:
    config = ModelConfig.from_preset("llama3_8b")
    lookup_and_norms = 128256 * 4096 + 65 * 4096
    products = 6 * (parameter_count(config) - lookup_and_norms)
    assert flops_per_token(config, 1, "causal") == pytest.approx(products, rel=1e-4)


def test_a_tied_output_layer_still_multiplies() -> None:
    tied = ModelConfig.from_preset("qwen3_0_6b")
    untied = ModelConfig.from_preset("qwen3_0_6b", share_embeddings_and_output_weights=False)
    assert flops_per_token(tied, 4096) == flops_per_token(untied, 4096)


def test_the_sliding_window_bounds_what_a_query_meets() -> None:
    config = ModelConfig.from_preset("mistral_7b_v0_1")
    assert attended_tokens(config, 2048, "causal") == 1024
    assert attended_tokens(config, 8192, "full") == 4096
    exact = sum(min(position + 1, 4096) for position in range(8192)) / 8192
    assert attended_tokens(config, 8192, "causal") == pytest.approx(exact, abs=1)


def test_the_vocabulary_must_be_known() -> None:
    config = ModelConfig.from_preset("demo_3m")
    with pytest.raises(ValueError, match="vocab_size"):
        parameter_count(config)
    with pytest.raises(ValueError, match="'causal' or 'full'"):
        flops_per_token(config, 128, "half", vocab_size=256)  # type: ignore[arg-type]
