"""The decoder: its config, presets and counts, and the model built from megatron-core's layers. Knows no training."""
