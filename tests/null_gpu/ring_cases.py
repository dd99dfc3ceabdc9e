"""Transformer Engine's context parallelism on cards of a null GPU that computes, beside whole sequences.

`python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.null_gpu.ring_cases` prints, from rank 0, how
far the worst rank's output and gradients are from the definition's.
"""

from __future__ import annotations

import importlib
import json
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from parallel.zigzag import zigzag_share
from tests.gpu.cases import apart
from tests.null_gpu.attention_cases import WHAT, Case, borders, defined, drawn, scale_of

CASES = (
    Case(queries=128, keys=128),
    Case(queries=128, keys=128, groups=4),
    Case("bshd_bshd_bshd", queries=128, keys=128),
    Case("thd_thd_thd", "padding_causal", lengths=(16, 64, 8, 40)),
)
ROWS = 2


def share_of(tensor: torch.Tensor, lengths: list[int], rank: int, ranks: int) -> torch.Tensor:
    """This rank's tokens of [b, heads, s, d]: an early and a late piece of each of the sequences in s."""
    pieces = []
    for one in tensor.split(lengths, dim=2):
        tokens = zigzag_share(np.arange(one.shape[2])[None], rank, ranks)[0]
        pieces.append(one[:, :, torch.from_numpy(np.ascontiguousarray(tokens))])
    return torch.cat(pieces, dim=2)


def ring(case: Case, stream: torch.cuda.Stream) -> Any:
    """The module, over all ranks."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    return engine.DotProductAttention(
        case.heads, case.width, case.groups, attention_dropout=0.0, qkv_format=case.layout.split("_")[0],
        cp_group=dist.group.WORLD, cp_global_ranks=list(range(dist.get_world_size())), cp_stream=stream,
        cp_comm_type="p2p", softmax_scale=scale_of(case),
    )  # fmt: skip


def attended(case: Case, stream: torch.cuda.Stream) -> dict[str, float]:
    """How far this rank's share is from the definition's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    packed = bool(case.lengths)
    lengths = list(case.lengths) if packed else [case.queries]
    whole = drawn(case, 1 if packed else ROWS, sum(lengths), sum(lengths))
    order = (0, 2, 1, 3) if packed or case.layout[0] == "b" else (2, 0, 1, 3)

    def own(tensor: torch.Tensor) -> torch.Tensor:
        share = share_of(tensor, lengths, rank, ranks).permute(order).contiguous()
        return share[0] if packed else share

    *parts, grad = (own(tensor).cuda() for tensor in whole)
    parts = [tensor.requires_grad_() for tensor in parts]
    options: dict[str, Any] = {"attn_mask_type": case.mask}
    if packed:
        longest, ends = max(lengths), borders(case.lengths).cuda()
        options |= {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": longest, "max_seqlen_kv": longest}
    out = ring(case, stream)(*parts, **options)
    grads = torch.autograd.grad(out, parts, grad.reshape(out.shape))
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in whole), strict=True)
    expected = [defined(case, query, key, value, one) for query, key, value, one in documents]
    found = dict(zip(WHAT, (out.reshape(grad.shape), None, *grads), strict=True))
    return {name: apart(tensor.cpu(), own(torch.cat([one[place] for one in expected], dim=2)))
            for place, (name, tensor) in enumerate(found.items()) if tensor is not None}  # fmt: skip


def main() -> None:
    """Every case, as one line of JSON."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    stream = torch.cuda.Stream()
    found = {case.name: attended(case, stream) for case in CASES}
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, found)
    if dist.get_rank() == 0:
        print(json.dumps({name: {what: max(one[name][what] for one in everybody) for what in found[name]}
                          for name in found}))  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
