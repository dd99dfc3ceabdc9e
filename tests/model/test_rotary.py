"""Rotary frequencies and angles against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model.config import ModelConfig
from model.core_config import core_config
from model.kernels.choice import TORCH
from model.rotary import RotaryAngles, attention_factor, inverse_frequencies
from parallel.layout import ParallelLayout

LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, Llama 3's base": {"rotary_base": 500000.0, "kv_channels": 128},
    "plain, narrow heads": {"kv_channels": 6},
    "linear": {"rope_scaling": {"kind": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": LLAMA3, "rotary_base": 500000.0, "kv_channels": 128},
    "llama3, Llama 3.2's factor": {"rope_scaling": LLAMA3 | {"factor": 32.0}, "rotary_base": 500000.0},
    "llama3, other borders": {
        "rope_scaling": LLAMA3
        | {"low_freq_factor": 2.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 512}
    },
    "yarn": {"rope_scaling": YARN, "kv_channels": 128},
    "yarn, Qwen's": {"rope_scaling": YARN | {"original_max_position_embeddings": 32768}, "rotary_base": 1000000.0},
    "yarn, other betas": {"rope_scaling": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}, "kv_channels": 64},
    "yarn, mscale": {"rope_scaling": YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}},
    "yarn, mscale alone": {"rope_scaling": YARN | {"mscale": 0.5}},
    "yarn, attention_factor": {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "yarn, factor 1": {"rope_scaling": YARN | {"factor": 1.0}},
    "yarn, short original": {"rope_scaling": YARN | {"original_max_position_embeddings": 64}, "kv_channels": 16},
}


def our_config(fields: dict[str, Any]) -> ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 256, "num_attention_heads": 4}
    return ModelConfig.model_validate(sizes | fields)


def peer(config: ModelConfig) -> LlamaRotaryEmbedding:
    """transformers' embedding for the same fields."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
    scaling = config.rope_scaling
    if scaling is not None:
        given = scaling.model_dump(exclude={"kind"}, exclude_none=True)
        parameters |= {"rope_type": scaling.kind, **given}
    longest = 131072
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_width,
            max_position_embeddings=longest,
            rope_parameters=parameters,
        )
    )


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_attention_factor(name: str) -> None:
    config = our_config(CASES[name])
    theirs = peer(config)
    frequencies = inverse_frequencies(config)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor(config.rope_scaling) == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_scaling_changes_the_frequencies() -> None:
    """The comparison above can fail: the cases differ from one another."""
    found = {
        name: inverse_frequencies(our_config(CASES[name] | {"kv_channels": 128, "rotary_base": 500000.0}))
        for name in CASES
    }
    for name in ("linear", "llama3", "yarn", "yarn, other betas", "llama3, other borders"):
        assert not torch.allclose(found[name], found["plain"], rtol=1e-3), name


@pytest.mark.parametrize("name", ["plain", "llama3", "yarn"])
def test_angles_of_any_positions(name: str) -> None:
    config = our_config(CASES[name])
    positions = torch.tensor([[0, 1, 2, 3, 8191], [100, 0, 1, 0, 8000]])
    angles = RotaryAngles(config, torch.device("cpu")).at(positions)  # [s, b, 1, width]
    theirs = peer(config)
    cosine, sine = theirs(torch.ones(1), positions)  # [b, s, width]
    factor = attention_factor(config.rope_scaling)
    assert angles.shape == (5, 2, 1, config.head_width)
    for ours, right in ((angles.cos() * factor, cosine), (angles.sin() * factor, sine)):
        torch.testing.assert_close(ours[:, :, 0].transpose(0, 1), right, rtol=0, atol=2e-3)  # fp32 at angle 8191


def test_consecutive_positions_are_those_from_0_at_any_length() -> None:
    angles = RotaryAngles(our_config({}), torch.device("cpu"))
    for length in (5, 9, 5):
        found = angles.consecutive(length)
        assert found.shape == (length, 1, 1, 64)
        assert torch.equal(found, angles.at(torch.arange(length)[None]))


@pytest.mark.filterwarnings("ignore:full scope is deprecated")  # of core, about itself
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("yarn")])
def test_core_multiplies_by_the_attention_factor(name: str) -> None:
    config = our_config(CASES[name])
    core = core_config(config, ParallelLayout(), "fp32", TORCH)
    found = _yarn_get_concentration_factor_from_config(core)
    assert found == pytest.approx(attention_factor(config.rope_scaling), rel=1e-12)
