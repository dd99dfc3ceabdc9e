"""`orthant model`: the architectures known by name."""

from __future__ import annotations

import json
from typing import Any

from model.config import ModelConfig
from model.counts import active_parameter_count, flops_per_token, parameter_count
from model.presets import DEMO_VOCABULARIES, PRESETS


def list_presets(*, seq_length: int, as_json: bool) -> None:
    """Print every preset with its parameters and the FLOPs of training on one token.

    Args:
        seq_length: tokens in one sequence; attention costs by it.
        as_json: one JSON object in place of the table.
    """
    rows = [_row(name, seq_length) for name in PRESETS]
    if as_json:
        print(json.dumps({"seq_length": seq_length, "presets": rows}, indent=2))
        return
    width = max(len(name) for name in PRESETS)
    print(f"{'preset':<{width}}    parameters        active  GFLOP/token  layers  hidden    heads  vocabulary")
    for row in rows:
        heads = f"{row['num_attention_heads']}/{row['num_query_groups']}"
        own = row["vocab_size"] is not None
        vocabulary = row["vocab_size"] if own else f"the tokenizer's (counted: {row['counted_vocab_size']})"
        print(
            f"{row['preset']:<{width}}  {_short(row['parameters']):>12}  {_short(row['active_parameters']):>12}  "
            f"{row['flops_per_token'] / 1e9:>11.3g}  {row['num_layers']:>6}  {row['hidden_size']:>6}  {heads:>7}  "
            f"{vocabulary}"
        )
    print(f"\nGFLOP/token: training (forward and backward) at {seq_length} tokens, causal attention. "
          "active: parameters that take part in one token. heads: query/key-value.")  # fmt: skip


def _row(name: str, seq_length: int) -> dict[str, Any]:
    config = ModelConfig.from_preset(name)
    counted = DEMO_VOCABULARIES[name] if config.vocab_size is None else config.vocab_size
    return {
        "preset": name,
        "parameters": parameter_count(config, counted),
        "active_parameters": active_parameter_count(config, counted),
        "flops_per_token": flops_per_token(config, seq_length, "causal", counted),
        "counted_vocab_size": counted,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_experts": config.num_experts,
        "moe_router_topk": None if config.num_experts is None else config.moe_router_topk,
        "moe_ffn_hidden_size": None if config.num_experts is None else config.block_width,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.query_groups,
        "kv_channels": config.head_width,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "window_size": config.window_size,
    }


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
