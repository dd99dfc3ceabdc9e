"""Mistral: Llama's table; a sliding window in the older ones."""

from __future__ import annotations

from checkpoint_tools.architectures.hugging_face_config import config_of, dimensions_of, model_of, sliding_window
from checkpoint_tools.architectures.llama import LLAMA
from checkpoint_tools.architectures.table import Architecture

MISTRAL = Architecture(
    name="mistral",
    model_type="mistral",
    causal_lm="MistralForCausalLM",
    rows=LLAMA.rows,
    dimensions=dimensions_of(model_of(sliding_window)),
    model=model_of(sliding_window),
    config=config_of("mistral", "MistralForCausalLM", lambda model: {"sliding_window": model.window_size}),
)
