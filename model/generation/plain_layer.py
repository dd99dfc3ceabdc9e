"""A decoder layer written down plainly, for steps of a few tokens.

Around the arithmetic of a token, core's TransformerLayer does much that only training and other models need (autograd
functions, offloading, recomputation): a quarter of a step of one row on CPU. With Transformer Engine's modules a step
takes the host 2.2 times as long, and a GPU waits for it. Here the weights of the same modules go through the same
operations in the same order, and give the bits of torch's modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from torch.nn.functional import rms_norm, silu

from model.kernels.linear import product
from model.kernels.norm import RMSNorm

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""query [t, groups, heads of a group, width], key and value [t, groups, width] -> [t, heads * width]."""

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine [t, 1, 1, width] of each token's angles; the first half of the sine has its sign turned."""


def rotation(angles: torch.Tensor, factor: float, dtype: torch.dtype) -> Rotation:
    """What `turned` multiplies by.

    Args:
        angles: [t, 1, 1, width] fp32, the second half as the first.
        factor: YaRN's, 1 for others.
    """
    cosine, sine = torch.cos(angles) * factor, torch.sin(angles) * factor
    half = angles.shape[-1] // 2
    return cosine.to(dtype), torch.cat((-sine[..., :half], sine[..., half:]), dim=-1).to(dtype)


def turned(heads: torch.Tensor, by: Rotation) -> torch.Tensor:
    """[t, groups, n, width] -> the same, rotated by position (Su et al. 2021)."""
    cosine, sine = by
    return heads * cosine + heads.roll(heads.shape[-1] // 2, dims=-1) * sine


ENGINE = ("megatron.core.extensions.transformer_engine", "transformer_engine.")
"""Where Transformer Engine's modules are defined, which need not be installed."""


class _NormInside:
    """The norm that Transformer Engine computes in one module with the product behind it."""

    def __init__(self, linear: Any) -> None:
        self._linear = linear

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self._linear.layer_norm_weight
        return weight

    @property
    def eps(self) -> float:
        return float(self._linear.eps)


class PlainLayer:
    """Stands for a core TransformerLayer's `forward`; in evaluation and without gradients only.

    Args:
        layer: one that `can_be_plain`.
        attend: attention of the step's tokens.
        rotation: cosine and sine from the angles that core hands on; asked by every layer, so worth remembering.
    """

    def __init__(self, layer: Any, attend: Attend, rotation: Callable[[torch.Tensor], Rotation]) -> None:
        attention = layer.self_attention
        self._attend, self._rotation = attend, rotation
        self._mlp = layer.mlp
        self._input_norm = _norm_before(attention.linear_qkv, layer.input_layernorm)
        self._mlp_norm = _norm_before(getattr(layer.mlp, "linear_fc1", None), layer.pre_mlp_layernorm)
        self._qkv, self._proj = attention.linear_qkv, attention.linear_proj
        self._query_norm, self._key_norm = attention.q_layernorm, attention.k_layernorm
        self._groups, self._width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        self._share = attention.num_attention_heads_per_partition // self._groups
        self._normalises_heads = not isinstance(attention.q_layernorm, IdentityOp | None)
        self._is_dense = isinstance(layer.mlp, MLP)
        self._tensor = attention.pg_collection.tp
        self._reduces = self._tensor.size() > 1

    @property
    def waits_for_weights(self) -> bool:
        """Whether weights come when modules are called, as with overlapped gathering; then core's layer has to run."""
        return bool(self._qkv._forward_pre_hooks)

    def __call__(
        self, hidden_states: torch.Tensor, rotary_pos_emb: torch.Tensor, **_core: Any
    ) -> tuple[torch.Tensor, None]:
        """[t, 1, hidden_size] -> the same, and core's context, of which there is none."""
        normalised = _normalised(hidden_states, self._input_norm)
        hidden = hidden_states + self._attended(normalised, self._rotation(rotary_pos_emb))
        return hidden + self._fed_forward(_normalised(hidden, self._mlp_norm)), None

    def _attended(self, normalised: torch.Tensor, by: Rotation) -> torch.Tensor:
        share, bias = self._share, self._qkv.bias
        mixed = product(normalised, self._qkv.weight.t())
        if bias is not None and bias.numel():  # Transformer Engine's is empty where there is none
            mixed = mixed + bias
        heads = mixed.view(mixed.shape[0], self._groups, share + 2, self._width)
        turning, value = heads[:, :, : share + 1], heads[:, :, share + 1]
        if self._normalises_heads:
            query, key = turning.split((share, 1), dim=2)
            turning = torch.cat((_normalised(query, self._query_norm), _normalised(key, self._key_norm)), dim=2)
        turning = turned(turning, by)
        out = self._attend(turning[:, :, :share], turning[:, :, share], value)
        return self._reduced(product(out[:, None], self._proj.weight.t()))

    def _fed_forward(self, normalised: torch.Tensor) -> torch.Tensor:
        if not self._is_dense:
            of_experts: torch.Tensor = self._mlp(normalised)[0]
            return of_experts
        gate, up = product(normalised, self._mlp.linear_fc1.weight.t()).chunk(2, dim=-1)
        return self._reduced(product(silu(gate) * up, self._mlp.linear_fc2.weight.t()))

    def _reduced(self, partial: torch.Tensor) -> torch.Tensor:
        if self._reduces:
            dist.all_reduce(partial, group=self._tensor)
        return partial


def _norm_before(linear: Any, norm: Any) -> Any:
    return _NormInside(linear) if hasattr(linear, "layer_norm_weight") else norm


def _normalised(hidden: torch.Tensor, norm: Any) -> torch.Tensor:
    return rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.eps)


def can_be_plain(layer: Any) -> bool:
    """Whether `PlainLayer` knows all that a layer does: torch's modules or Transformer Engine's, a whole sequence."""
    attention, mlp = layer.self_attention, layer.mlp
    kinds: list[tuple[Any, Any]] = [
        (_norm_before(attention.linear_qkv, layer.input_layernorm), (RMSNorm, _NormInside)),
        (_norm_before(getattr(mlp, "linear_fc1", None), layer.pre_mlp_layernorm), (RMSNorm, _NormInside)),
        (attention.linear_qkv, ColumnParallelLinear),
        (attention.linear_proj, RowParallelLinear),
        (attention.q_layernorm, (RMSNorm, IdentityOp, type(None))),
        (attention.k_layernorm, (RMSNorm, IdentityOp, type(None))),
    ]
    if isinstance(mlp, MLP):
        kinds += [(mlp.linear_fc1, ColumnParallelLinear), (mlp.linear_fc2, RowParallelLinear)]
    return (
        all(isinstance(module, kind) or type(module).__module__.startswith(ENGINE) for module, kind in kinds)
        and not layer.config.sequence_parallel
        and not layer.config.add_bias_linear
        and layer.config.num_query_groups >= attention.pg_collection.tp.size()
    )
