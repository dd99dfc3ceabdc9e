"""What a peer does with the same model. Run by benchmarks/convert.py, each in a process of its own.

mbridge is made for GPUs and Transformer Engine. Here it runs on CPU through our platform, with core's local layers,
whose norms have other names; nothing else of it is changed. It needs transformers 4, and mbridge's head of 2026.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def transformers(source: str, target: str) -> dict[str, float]:
    """from_pretrained and save_pretrained, the usual way to rewrite a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    loaded = time.perf_counter()
    model.save_pretrained(target)
    return {"load_seconds": loaded - started, "save_seconds": time.perf_counter() - loaded}


def mbridge(source: str, target: str) -> dict[str, float]:
    """Hugging Face's files into core's GPTModel in memory, and back into files: both ways, without files between."""
    from parallel.platform import install

    install()
    import torch
    import torch.distributed as dist
    from mbridge import AutoBridge
    from mbridge.core.llm_bridge import LLMBridge
    from torch._C._distributed_c10d import HashStore

    from parallel.groups import ProcessGroups
    from parallel.layout import ParallelLayout

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    torch.nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign]  # mbridge asks for a GPU
    LLMBridge._get_transformer_layer_spec = _local_layers
    with ProcessGroups(ParallelLayout(), seed=0):
        bridge = AutoBridge.from_pretrained(source, dtype=torch.bfloat16)
        _know_local_names(type(bridge))
        started = time.perf_counter()
        model = bridge.get_model()
        built = time.perf_counter()
        bridge.load_weights(model, source)
        loaded = time.perf_counter()
        bridge.save_weights(model, target)
    return {
        "build_seconds": built - started,
        "load_seconds": loaded - built,
        "save_seconds": time.perf_counter() - loaded,
    }


def _local_layers(bridge: Any, _vp_stage: int | None = None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    bridge.has_vp_stage = True
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    return TransformerBlockSubmodules([layer] * bridge.config.num_layers, layer_norm=WrappedTorchNorm)


def _know_local_names(bridge: Any) -> None:
    fused = bridge._weight_name_mapping_mcore_to_hf

    def names(self: Any, name: str) -> Any:
        name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        return fused(self, name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"))

    bridge._weight_name_mapping_mcore_to_hf = names


if __name__ == "__main__":
    figures = {"transformers": transformers, "mbridge": mbridge}[sys.argv[1]](*sys.argv[2:])
    print("\n" + json.dumps({name: round(value, 3) for name, value in figures.items()}))
