"""One rank of ours against transformers' models and torch's AdamW, which share no code with us.

The other parity tests take one rank for the truth; here it is held itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from tests.ranks import RankPool
from tests.training.hugging_face import fresh_reference, our_logits, run_from, train_in_plain_torch, under_our_names
from tests.training.moe_cases import MODELS as MIXTURES
from tests.training.parity_cases import SMALL, VOCAB_SIZE
from training.parity import Bounds, Difference, differences

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "llama": ("Llama", {}, None),
    "llama_wide_heads": ("Llama", {"kv_channels": 24}, None),
    "llama3_1": ("Llama", {"rope_scaling": {"kind": "llama3", **LLAMA3}}, {"rope_type": "llama3", **LLAMA3}),
    "linear": ("Llama", {"rope_scaling": {"kind": "linear", "factor": 4.0}}, {"rope_type": "linear", "factor": 4.0}),
    "yarn": ("Llama", {"rope_scaling": {"kind": "yarn", **YARN}}, {"rope_type": "yarn", **YARN}),
    "mistral": ("Mistral", {"window_size": 7}, None),
    "qwen2": ("Qwen2", {"add_qkv_bias": True, "share_embeddings_and_output_weights": True}, None),
    "qwen3": ("Qwen3", {"qk_layernorm": True, "kv_channels": 24, "layernorm_epsilon": 1e-6}, None),
    "mixtral": ("Mixtral", MIXTURES["mixtral"], None),
    "qwen3_moe": ("Qwen3Moe", MIXTURES["qwen3_moe"], None),
    "not_renormalised": ("Qwen3Moe", MIXTURES["qwen3_moe"] | {"moe_router_pre_softmax": True}, None),
}


def built(family: str) -> tuple[ModelConfig, Any]:
    """Our config of a family, and transformers' model of it."""
    name, fields, rope = FAMILIES[family]
    model = ModelConfig.model_validate(SMALL | {"kernels": "torch"} | fields)
    return model, fresh_reference(model, name, rope)


def weights_of(reference: Any, model: ModelConfig) -> dict[str, torch.Tensor]:
    theirs = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    return under_our_names(theirs, model)


def logits_apart(ranks: RankPool, model: ModelConfig, reference: Any, weights: dict[str, torch.Tensor]) -> float:
    """Largest difference of logits between `reference` and ours with `weights`, over the largest logit."""
    tokens = torch.randint(0, VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = reference.eval()(input_ids=tokens).logits
    assert float(theirs.std()) > 0.5, "logits near 0 would hide differences"
    ours = ranks.run(1, our_logits, weights, model, tokens)[0]
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(ranks: RankPool, family: str) -> None:
    model, reference = built(family)
    assert logits_apart(ranks, model, reference, weights_of(reference, model)) < 1e-5


@pytest.mark.parametrize("family", ["llama3_1", "linear", "yarn", "mistral", "qwen2", "qwen3"])
def test_a_feature_that_is_left_out_is_seen(ranks: RankPool, family: str) -> None:
    model, reference = built(family)
    off = {"rope_scaling": None, "window_size": None, "qk_layernorm": False, "add_qkv_bias": False}
    without = model.model_copy(update=off)
    assert logits_apart(ranks, without, reference, weights_of(reference, model)) > 1e-3


def trained_apart(ranks: RankPool, family: str, fault: str | None = None) -> list[Difference]:
    """Five steps of ours and of plain torch from the same weights on the same tokens; what is over its bound."""
    model, reference = built(family)
    ours = ranks.run(1, run_from, weights_of(reference, model), model, fault)[0]
    return [found for found in differences(train_in_plain_torch(reference, model), ours, Bounds()) if not found.within]


@pytest.mark.parametrize("other", [{"moe_router_pre_softmax": True}, {"moe_router_topk": 2}], ids=str)
def test_another_choice_of_experts_is_seen(ranks: RankPool, other: dict[str, Any]) -> None:
    model, reference = built("qwen3_moe")
    assert logits_apart(ranks, model.model_copy(update=other), reference, weights_of(reference, model)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "llama3_1", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
def test_training_equals_plain_torch(ranks: RankPool, family: str) -> None:
    over = trained_apart(ranks, family)
    assert not over, "\n".join(f"{d.quantity}: {d.relative:.2e} > {d.bound:.0e}" for d in over)


def test_decay_on_norms_is_seen(ranks: RankPool) -> None:
    over = {difference.quantity for difference in trained_apart(ranks, "qwen2", fault="decay_on_norms_and_biases")}
    assert {
        "weight of decoder.final_layernorm.weight",
        "weight of decoder.layers.0.self_attention.linear_qkv.bias",
    } <= over
    assert not any(quantity.startswith("gradient of") for quantity in over)


@pytest.mark.parametrize("fault", ["micro_batches_balanced_alike", "masked_tokens_balanced_too"])
def test_router_losses_over_other_tokens_are_seen(ranks: RankPool, fault: str) -> None:
    over = {difference.quantity for difference in trained_apart(ranks, "mixtral", fault)}
    assert "gradient of decoder.layers.0.mlp.router.weight" in over
    assert not over & {"gradient of output_layer.weight", "loss of step 1"}
