"""What our decoder makes of a converted checkpoint, on the ranks of a pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from checkpoint_tools.manifest import read_manifest
from model.core_config import core_config
from model.decoder import build_decoder_chunks
from model.kernels.choice import TORCH
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from training.checkpoint.tensors import read_weights

TOKENS = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(3))


def our_logits(folder: Path, layout: ParallelLayout) -> torch.Tensor | None:
    """Logits [b, s, vocabulary] of TOKENS on the last stage; None on the others."""
    manifest = read_manifest(folder)
    with ProcessGroups(layout, seed=0), torch.no_grad():
        core = core_config(manifest.model, layout, "fp32", TORCH)
        chunks = build_decoder_chunks(manifest.model, core, layout, manifest.vocab_size, TORCH)
        read_weights(chunks, folder)
        for chunk in chunks:
            chunk.eval()
        return forward_only(chunks, manifest.vocab_size)


def forward_only(
    chunks: list[Any], vocab_size: int, call: Callable[[Any], torch.Tensor] = lambda chunk: chunk(TOKENS)
) -> torch.Tensor | None:
    """Run TOKENS through all stages by core's own schedule."""
    found: list[torch.Tensor] = []

    def step(_batches: Any, chunk: Any) -> tuple[torch.Tensor, object]:
        output = call(chunk)

        def keep(logits: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            found.append(logits)
            return logits

        return output, keep

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter([None])] * len(chunks) if len(chunks) > 1 else iter([None]),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=parallel_state.get_pipeline_model_parallel_world_size(),  # interleaved: as many
        seq_length=TOKENS.shape[1],
        micro_batch_size=TOKENS.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not found:
        return None
    whole = gather_from_tensor_model_parallel_region(found[0])
    if parallel_state.get_tensor_model_parallel_rank() or dist.get_rank(parallel_state.get_data_parallel_group()):
        return None
    return whole[..., :vocab_size].clone()
