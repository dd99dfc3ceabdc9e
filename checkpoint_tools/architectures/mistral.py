"""Mistral: Llama's table; a sliding window in the older ones."""

from __future__ import annotations

from checkpoint_tools.architectures.hugging_face_config import config_of, dimensions_of, model_of, sliding_window
from checkpoint_tools.architectures.llama import LLAMA
from checkpoint_tools.architectures.table import Architecture

WINDOW = 4096
"""Where config.json does not say; null says that there is none."""

_model = model_of(lambda config: sliding_window(config, WINDOW))

MISTRAL = Architecture(
    name="mistral",
    model_type="mistral",
    causal_lm="MistralForCausalLM",
    rows=LLAMA.rows,
    dimensions=dimensions_of(_model),
    model=_model,
    config=config_of("mistral", "MistralForCausalLM", lambda model: {"sliding_window": model.window_size}),
)
