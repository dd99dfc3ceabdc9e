"""Tensor-parallel communication under matrix products: Transformer Engine's user buffers.

Core's layers ask for them where `tp_comm_overlap` is set (extensions/transformer_engine.py:532-560); whoever trains has
to make them before the first layer is built, as Megatron-LM does in training/initialize.py.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from parallel.layout import ParallelLayout


def make_user_buffers(layout: ParallelLayout, *, tokens: int, hidden_size: int, fp8: bool, bf16: bool) -> None:
    """Make the buffers once in a process; nothing where the layout does not ask for them. Collective.

    Args:
        tokens: of one micro-batch on one context-parallel rank, before sequence parallelism cuts them.
        hidden_size: of the model.
        fp8, bf16: whether any layer computes in it; a layer finds only buffers of its own kind.
    """
    if not layout.tp_comm_overlap:
        return
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    if getattr(base, "_ub_communicators", None) is None:
        if not base.tex.device_supports_multicast():
            # Ranks then write into each other's memory one by one; without the word Transformer Engine refuses.
            os.environ.setdefault("UB_SKIPMC", "1")
        kinds = base.UserBufferQuantizationMode
        base.initialize_ub(
            shape=[tokens, hidden_size],
            tp_size=layout.tp,
            quantization_modes=[kind for kind, wanted in ((kinds.FP8, fp8), (kinds.NONE, bf16)) if wanted],
            ub_cfgs={},
            bootstrap_backend="nccl",
        )
