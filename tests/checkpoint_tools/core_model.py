"""Core's own GPTModel from rank files, on the ranks of a pool: nothing of ours between the files and the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from checkpoint_tools.record import read_record
from model.core_config import core_config
from model.kernels.choice import TORCH
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.checkpoint_tools.logits import TOKENS, forward_only


def core_logits(folder: Path, layout: ParallelLayout) -> torch.Tensor | None:
    """Logits [b, s, vocabulary] of TOKENS on the last stage; None on the others.

    Rank files are loaded as Megatron-LM does: torch.load, then load_state_dict with strict=True.
    """
    record = read_record(folder)
    assert record is not None and record.model is not None
    with ProcessGroups(layout, seed=0), torch.no_grad():
        config = core_config(record.model, layout, "fp32", TORCH)
        config.use_te_activation_func = config.apply_rope_fusion = False  # core's own operators, not ours
        name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
        if layout.pp > 1:
            name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
        if layout.ep > 1:
            name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
        state = torch.load(folder / name / "model_optim_rng.pt", map_location="cpu", weights_only=False)
        rows = state["args"].padded_vocab_size
        stages = [None] if layout.vpp == 1 else list(range(layout.vpp))
        chunks = [_chunk(record.model, config, rows, stage) for stage in stages]
        for number, chunk in enumerate(chunks):
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
            chunk.load_state_dict(state["model" if layout.vpp == 1 else f"model{number}"], strict=True)
        mask, positions = _mask(record.model.window_size), torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
        return forward_only(chunks, record.vocab_size, lambda chunk: chunk(TOKENS, positions, mask))


def _chunk(model: Any, config: Any, rows: int, stage: int | None) -> Any:
    layer = get_gpt_layer_local_spec(
        num_experts=model.num_experts, qk_layernorm=model.qk_layernorm, normalization="RMSNorm"
    )
    count = get_num_layers_to_build(config, vp_stage=stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules([layer] * count, layer_norm=WrappedTorchNorm),
        vocab_size=rows,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=int(model.rotary_base),
        vp_stage=stage,
    ).eval()


def _mask(window: int | None) -> torch.Tensor:
    """[1, 1, s, s], True where a query may not look."""
    places = torch.arange(TOKENS.shape[1])
    behind = places[:, None] - places[None, :]
    return ((behind < 0) | (behind >= (window or len(places))))[None, None]
