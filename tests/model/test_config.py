"""The architecture: presets and what lies over them, resolved sizes, padding of the vocabulary."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from foundation.errors import ConfigError
from model.config import ModelConfig
from model.presets import PRESETS


def test_given_fields_lie_over_the_preset() -> None:
    config = ModelConfig.from_preset("llama3_8b", num_layers=4)
    assert (config.num_layers, config.hidden_size, config.num_query_groups) == (4, 4096, 8)
    assert ModelConfig.model_validate({"preset": "llama3_8b", "num_query_groups": None}).query_groups == 32


def test_an_unknown_preset_is_told_its_neighbours() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_preset("lama3_8b")
    assert "model.preset=llama3_8b" in str(caught.value.cure)
    with pytest.raises(ConfigError, match="is one of demo_3m"):
        ModelConfig.from_preset("gpt")


def test_rope_scaling_of_a_preset_can_be_changed_in_part() -> None:
    scaling = ModelConfig.from_preset("llama3_1_8b", rope_scaling={"factor": 32.0}).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_max_position_embeddings) == ("llama3", 32, 8192)
    other = ModelConfig.from_preset("llama3_1_8b", rope_scaling={"kind": "linear", "factor": 2.0}).rope_scaling
    assert other is not None and other.original_max_position_embeddings is None
    assert ModelConfig.from_preset("llama3_1_8b", rope_scaling=None).rope_scaling is None


def test_presets_are_not_shared_between_configs() -> None:
    before = {name: dict(fields) for name, fields in PRESETS.items()}
    for name in PRESETS:
        ModelConfig.from_preset(name, num_layers=1, rope_scaling={"kind": "linear", "factor": 2.0})
    assert {name: dict(fields) for name, fields in PRESETS.items()} == before


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_the_fields_of_their_family(name: str) -> None:
    config = ModelConfig.from_preset(name)
    assert config.head_width % 2 == 0
    assert config.qk_layernorm == name.startswith("qwen3")
    assert config.add_qkv_bias == name.startswith("qwen2_5")
    assert (config.rope_scaling is not None) == name.startswith("llama3_1")
    assert (config.window_size == 4096) == (name == "mistral_7b_v0_1")
    assert config.layernorm_epsilon == (1e-6 if "qwen" in name and name != "qwen2_5_72b" else 1e-5)


def test_heads_are_resolved() -> None:
    plain = ModelConfig(num_layers=1, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4)
    assert (plain.query_groups, plain.head_width) == (4, 16)
    wide = ModelConfig.from_preset("qwen3_0_6b")
    assert wide.head_width == 128 != wide.hidden_size // wide.num_attention_heads


def test_the_padded_vocabulary_is_the_same_at_every_usual_layout() -> None:
    config = ModelConfig.from_preset("llama3_8b")
    assert {config.padded_vocab_size(128256, size) for size in (1, 2, 4, 8, 16)} == {128256}
    assert config.padded_vocab_size(50257, 1) == 50304
    assert config.padded_vocab_size(50257, 3) % 384 == 0
    assert config.padded_vocab_size(50257, 3) >= 50257


@pytest.mark.parametrize("field", ["num_layers", "hidden_size", "num_query_groups", "window_size", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "4"])
def test_sizes_are_whole_numbers_of_one_or_more(field: str, value: object) -> None:
    with pytest.raises(ValidationError):
        ModelConfig.from_preset("demo_3m", **{field: value})


def test_a_config_does_not_change_and_takes_no_strangers() -> None:
    config = ModelConfig.from_preset("demo_3m")
    with pytest.raises(ValidationError, match="frozen"):
        config.num_layers = 5  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        ModelConfig.from_preset("demo_3m", layers=3)
