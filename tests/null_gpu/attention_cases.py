"""Transformer Engine's attention on a null GPU that computes, beside its definition in float64."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from tests.gpu.cases import apart

WHAT = ("output", "statistics", "query", "key", "value")
TO_LAYOUT = {"s": (2, 0, 1, 3), "b": (0, 2, 1, 3)}
FROM_LAYOUT = {"s": (1, 2, 0, 3), "b": (0, 2, 1, 3)}


@dataclass(frozen=True)
class Case:
    """One attention.

    Attributes:
        layout: Transformer Engine's name of where queries, keys and values lie.
        left: keys before a query's own that it sees; -1: all.
        lengths: documents, of queries and of keys alike; packed (layout thd) or padded in rows of 64.
        padding: tokens that lie unused behind each packed document.
    """

    layout: str = "sbhd_sbhd_sbhd"
    mask: str = "causal"
    left: int = -1
    heads: int = 4
    groups: int = 2
    queries: int = 64
    keys: int = 64
    width: int = 32
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = ()
    padding: int = 0

    @property
    def name(self) -> str:
        """The values that differ from the usual ones."""
        usual = Case()
        asked = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(usual, name)]
        return " ".join(asked) or "usual"


PACKED_LAYOUTS = ("sb3hd", "sbh3d", "bs3hd", "bsh3d")
CASES = (
    *(Case(layout, groups=4) for layout in PACKED_LAYOUTS),
    *(Case(layout) for layout in ("sbhd_sbhd_sbhd", "bshd_bshd_bshd", "sbhd_sb2hd", "bshd_bsh2d", "sbhd_bshd_bshd")),
    *(Case(mask=mask, keys=128) for mask in ("no_mask", "causal_bottom_right")),
    Case(groups=1, dtype="float16"),
    Case(left=15),
    Case(left=0),
    Case(mask="causal_bottom_right", left=9, keys=128),
    Case("bshd_bshd_bshd", "padding", lengths=(64, 5, 31)),
    Case("sbhd_sbhd_sbhd", "padding_causal", lengths=(64, 5, 31)),
    *(Case("thd_thd_thd", "padding_causal", left, lengths=(1, 64, 30, 7), padding=padding)
      for left in (-1, 6) for padding in (0, 3)),
    Case("thd_thd_thd", "padding", lengths=(16, 48), groups=4),
    Case("t3hd", "padding_causal", lengths=(16, 48, 9), groups=4),
)  # fmt: skip


def seen(case: Case, queries: int, keys: int) -> torch.Tensor:
    """True where query i sees key j: [queries, keys]."""
    offset = keys - queries if "bottom_right" in case.mask else 0
    behind = torch.arange(queries)[:, None] + offset - torch.arange(keys)[None]
    before = behind >= 0 if "causal" in case.mask else torch.ones(queries, keys, dtype=torch.bool)
    return before & (behind <= case.left) if case.left >= 0 else before


def defined(
    case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor
) -> list[torch.Tensor]:
    """By the definition: output, statistics [b, heads, s], gradients; of [b, heads, s, d]."""
    query, key, value = (tensor.double().requires_grad_() for tensor in (query, key, value))
    more = case.heads // case.groups
    scores = query @ key.repeat_interleave(more, 1).transpose(2, 3) * scale_of(case)
    scores = scores.masked_fill(~seen(case, query.shape[2], key.shape[2]), -math.inf)
    out = scores.softmax(-1) @ value.repeat_interleave(more, 1)
    grads = torch.autograd.grad(out, (query, key, value), grad.double())
    return [out.detach(), scores.detach().logsumexp(-1), *grads]


def scale_of(case: Case) -> float:
    """Not the usual one, so that it shows where it is left out."""
    return 0.3 / math.sqrt(case.width)


def engines(case: Case, parts: list[torch.Tensor], grad: torch.Tensor, **lengths: torch.Tensor) -> list[torch.Tensor]:
    """What Transformer Engine makes of them, on the CPU: output, statistics, gradients."""
    called: Any = importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
    types: Any = importlib.import_module("transformer_engine.pytorch.constants").TE_DType
    options: dict[str, Any] = {
        "fused_attention_backend": called.FusedAttnBackend["F16_arbitrary_seqlen"],
        "attn_scale": scale_of(case),
        "qkv_layout": case.layout,
        "attn_mask_type": case.mask,
        "window_size": (case.left, 0 if "causal" in case.mask else -1),
    }
    options |= {name: tensor.cuda() for name, tensor in lengths.items() if name.endswith("padded")}
    sizes = (case.queries, case.keys, lengths["cu_seqlens_q"].cuda(), lengths["cu_seqlens_kv"].cuda())
    dtype = getattr(torch, case.dtype)
    out, kept = called.fused_attn_fwd(True, *sizes, *parts, dtype, **options)
    grads = called.fused_attn_bwd(*sizes, *parts, out, grad.cuda(), dtype, types[dtype], kept, **options)
    return [tensor.cpu() for tensor in (out, kept[0], *grads[:3])]


def laid_out(case: Case, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Queries, keys and values on the card as the layout has them: each alone, or together in one tensor."""
    names = case.layout.split("_")
    for alone, name in ((0, names[0]), (1, names[-1])):
        if "3" in name or "2" in name:
            place = name.index("3" if "3" in name else "2")
            together = torch.stack(tensors[alone:], dim=place).cuda()
            return [*(tensor.contiguous().cuda() for tensor in tensors[:alone]), *together.unbind(place)]
    return [tensor.contiguous().cuda() for tensor in tensors]


def drawn(case: Case, rows: int, queries: int, keys: int) -> list[torch.Tensor]:
    """Queries, keys, values and the output's gradient, [b, heads, s, d]."""
    draw = torch.Generator().manual_seed(1)
    shapes = ((case.heads, queries), (case.groups, keys), (case.groups, keys), (case.heads, queries))
    dtype = getattr(torch, case.dtype)
    return [torch.randn(rows, *shape, case.width, generator=draw).to(dtype) for shape in shapes]


def borders(lengths: tuple[int, ...]) -> torch.Tensor:
    """[0, first, first + second, ...] int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def compared(case: Case) -> dict[str, float]:
    """How far apart the output, the statistics and the gradients are, of the worst document."""
    return of_documents(case) if case.layout.startswith("t") else of_rows(case)


def of_rows(case: Case) -> dict[str, float]:
    """Rows of the same length, or padded to it."""
    rows = len(case.lengths) or 2
    *parts, grad = drawn(case, rows, case.queries, case.keys)
    first, second = case.layout.split("_")[0][0], case.layout.split("_")[-1][0]
    orders = (first, second, second)
    wholes = [(size,) * rows for size in (case.queries, case.keys)]
    ends_q, ends_kv = (borders(case.lengths or whole) for whole in wholes)
    on_card = laid_out(case, [tensor.permute(TO_LAYOUT[order]) for tensor, order in zip(parts, orders, strict=True)])
    found = engines(case, on_card, grad.permute(TO_LAYOUT[first]).contiguous(), cu_seqlens_q=ends_q,
                    cu_seqlens_kv=ends_kv)  # fmt: skip
    out, statistics, *grads = found
    turned = [tensor.permute(FROM_LAYOUT[order])
              for tensor, order in zip((out, *grads), (first, *orders), strict=True)]  # fmt: skip
    everything = [turned[0], statistics[..., 0], *turned[1:]]
    if not case.lengths:
        query, key, value = parts
        return distances(everything, defined(case, query, key, value, grad))
    worst: dict[str, float] = {}
    for row, length in enumerate(case.lengths):
        query, key, value, own = (tensor[row : row + 1, :, :length] for tensor in (*parts, grad))
        of_row = distances(
            [tensor[row : row + 1, :, :length] for tensor in everything], defined(case, query, key, value, own)
        )
        worst = {name: max(worst.get(name, 0.0), distance) for name, distance in of_row.items()}
    return worst


def of_documents(case: Case) -> dict[str, float]:
    """Documents one after another, with tokens between them that belong to none."""
    places = borders(tuple(length + case.padding for length in case.lengths))
    total = int(places[-1])
    *parts, grad = drawn(case, 1, total, total)
    ends = borders(case.lengths)
    packed = [tensor[0].transpose(0, 1) for tensor in (*parts, grad)]  # [t, heads, d]
    sized = Case(**{**vars(case), "queries": max(case.lengths), "keys": max(case.lengths)})
    on_card = laid_out(case, packed[:3])
    found = engines(sized, on_card, packed[3].contiguous(), cu_seqlens_q=ends, cu_seqlens_kv=ends,
                    cu_seqlens_q_padded=places, cu_seqlens_kv_padded=places)  # fmt: skip
    worst: dict[str, float] = {}
    for start, length in zip(places.tolist(), case.lengths, strict=False):
        query, key, value, own = (tensor[:, :, start : start + length] for tensor in (*parts, grad))
        of_one = [tensor[start : start + length].transpose(0, 1)[None] for tensor in found]
        of_one[1] = of_one[1][..., 0]
        distance = distances(of_one, defined(case, query, key, value, own))
        worst = {name: max(worst.get(name, 0.0), value) for name, value in distance.items()}
        unused = [tensor[start + length : start + length + case.padding] for tensor in (found[0], *found[2:])]
        assert not any(tensor.any() for tensor in unused), case
    return worst


def distances(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, float]:
    """Of each of the five, relative to the expected one's size; absolute where that is nothing."""
    return {name: apart(one, other) if other.any() else float(one.double().norm())
            for name, one, other in zip(WHAT, found, expected, strict=True)}  # fmt: skip
