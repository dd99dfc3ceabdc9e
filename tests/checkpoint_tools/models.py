"""Small models of transformers with every parameter drawn afresh: their own initialisation leaves norms at 1 and biases
at 0, which hides tensors that are swapped. Imported by tests, benchmarks and rank processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.catalog import Format
from checkpoint_tools.convert import Manner, Report, convert
from checkpoint_tools.formats.rank_cuts import RankGrid
from checkpoint_tools.planning import Form

VOCAB_SIZE = 131
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
MIXTURE = {"num_experts_per_tok": 2, "experts_implementation": "eager"}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 8, "vocab_size": 128}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3_1": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 8}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None, **MIXTURE}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 12, **MIXTURE}),
}
"""Families that the decoder runs: transformers' class and what differs from SIZES."""
WEIGHTS_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2", {"head_dim": 12}),
    "gemma3": ("Gemma3", {"head_dim": 12}),
}


def fresh_model(family: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """A transformers model of `family`: norms around 1, everything else around 0, nothing equal to it."""
    import transformers

    name, fields = (FAMILIES | WEIGHTS_ONLY)[family]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(5)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**(SIZES | fields | sizes))).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1)
            if parameter_name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model.eval()


def saved_model(family: str, folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """The same, saved by transformers to `folder`."""
    model = fresh_model(family, dtype, **sizes)
    model.save_pretrained(folder)
    return model


def file_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of `folder`, read by safetensors itself."""
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - it is no dictionary
                assert name not in tensors
                tensors[name] = handle.get_tensor(name)
    return tensors


def same_bits(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same in name, dtype, shape and every bit."""
    wrong = sorted(some.keys() ^ others.keys())
    for name in some.keys() & others.keys():
        a, b = some[name], others[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            wrong.append(name)
    return wrong


def converted(source: Path, target: Path, to: Format, **grid: Any) -> Report:
    """Convert within this process: what a test times out on is then seen."""
    return convert(source, target, Form(to, RankGrid(**grid)), Manner(processes=1))
