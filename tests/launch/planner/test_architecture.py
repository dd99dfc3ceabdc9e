"""The planner's view of a model counts what model.counts counts."""

from __future__ import annotations

import pytest

from launch.planner.architecture import from_model_config
from launch.planner.models_by_name import find_model, known_models
from model.config import ModelConfig
from model.counts import flops_per_token, parameter_count
from model.presets import DEMO_VOCABULARIES, PRESETS

NOTHING: dict[str, float | None] = {}


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_are_those_of_the_model(preset: str) -> None:
    config = ModelConfig.from_preset(preset)
    vocab = config.vocab_size or DEMO_VOCABULARIES[preset]
    seen = from_model_config(config, vocab)
    assert seen.parameters() == pytest.approx(parameter_count(config, vocab), rel=1e-9)
    if config.window_size is None:
        for causal, convention in ((True, "causal"), (False, "full")):
            expected = flops_per_token(config, 4096, convention, vocab)  # type: ignore[arg-type]
            assert seen.flops_per_token(4096, causal=causal) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("printed", "name", "billions"),
    [
        ("LLAMA3.1_405B", "llama3-405b", 405.9),
        ("LLAMA3_70B SFT", "llama3-70b", 70.6),
        ("LLAMA2-7B LoRA", "llama2-7b", 6.74),
        ("DeepSeekV3 (w/o MTP)", "deepseek-v3", 671),
        ("Qwen3_30B_a3B (tokendrop)", "qwen3-30b", 30.5),
        ("GPT OSS 120B", "gpt-oss-120b", 116.8),
        ("Nemotron-340B", "nemotron-340b", 341),
        ("Nemotron4 15B", "nemotron-15b", 15.6),
        ("Mixtral-8x7B", "mixtral-8x7b", 46.7),
        ("MPT 13b", "mpt-13b", 12.9),
        ("Llama 3 8B", "llama3-8b", 8.03),
        ("LLaMA 65B", "llama-65b", 66.7),
        ("Grok1 314B", "grok-1", 316),
    ],
)
def test_printed_names_find_their_model(printed: str, name: str, billions: float) -> None:
    found, _ = find_model(printed, NOTHING)
    assert found.name == name
    assert found.parameters() / 1e9 == pytest.approx(billions, rel=0.02)


def test_a_size_alone_gives_a_decoder_of_that_size() -> None:
    found, notes = find_model("some GPT 39.1B", NOTHING)
    assert found.parameters() == pytest.approx(39.1e9, rel=0.05)
    assert "39.1B" in notes[0]


def test_stated_sizes_win() -> None:
    found, _ = find_model("GPT 145.6B", {"layers": 80.0, "hidden": 12288.0, "heads": 96.0, "vocab": 51200.0})
    assert (found.layers, found.hidden_size, found.heads, found.head_width) == (80, 12288, 96, 128)
    assert found.parameters() == pytest.approx(145.6e9, rel=0.01)


def test_every_known_model_has_layers_that_add_up() -> None:
    for name, model in known_models().items():
        hybrid = model.state_layers > 0
        blocks = model.dense_layers + model.moe_layers
        if hybrid:
            assert model.attention_layers + model.state_layers + blocks == model.layers, name
        else:
            assert model.attention_layers == model.layers == blocks, name
