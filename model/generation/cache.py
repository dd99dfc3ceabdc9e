"""Keys and values of tokens already read, and the attention that reads them.

A step of generation lays out the new tokens of all its rows one after another, as a single row: prompts of unequal
length need no padding, and whatever cuts a sequence (sequence parallelism) cuts this one. Only attention has to know
where rows begin; it takes the place of the provider's `core_attention` for the length of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

GROWTH = 128
"""Tokens of a row that a cache grows by at least."""


@dataclass(frozen=True)
class Step:
    """The new tokens of a group's rows.

    Attributes:
        first: whether rows are empty so far; then `counts` may differ, else each row has one new token.
        counts: new tokens of each row.
        lengths: [rows] int64, tokens of each row after the step.
        longest: of `lengths`.
        masks: those that layers have asked for, by their windows.
    """

    first: bool
    counts: tuple[int, ...]
    lengths: torch.Tensor
    longest: int
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(self.counts)

    def seen(self, window: int | None) -> torch.Tensor | None:
        """[rows, 1, 1, longest] bool: what the newest token of each row attends to; None: all there is."""
        if window not in self.masks:
            self.masks[window] = self._seen(window)
        return self.masks[window]

    def _seen(self, window: int | None) -> torch.Tensor | None:
        slots = torch.arange(self.longest, device=self.lengths.device)
        seen = slots < self.lengths[:, None]
        if window is not None:
            seen &= slots >= self.lengths[:, None] - window
        return None if bool(seen.all()) else seen[:, None, None]


class KeyValueCache:
    """What one rank's layers remember of the rows of a group: [rows, groups of this rank, capacity, width] a layer.

    Args:
        rows: of the group.
        limit: tokens that a row can ever have.
    """

    def __init__(self, rows: int, limit: int) -> None:
        self._rows, self._limit = rows, limit
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor, step: Step) -> None:
        """Write the new tokens [tokens or more, groups, width] of `step`."""
        for held, new in ((self._keys, keys), (self._values, values)):
            held[layer] = self._with_room(held.get(layer), new, step.longest)
            if not step.first:
                rows = torch.arange(self._rows, device=new.device)
                held[layer][rows, :, step.lengths - 1] = new[: self._rows]
                continue
            for row, part in enumerate(new[: step.tokens].split(step.counts)):
                held[layer][row, :, : part.shape[0]] = part.transpose(0, 1)

    def read(self, layer: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, groups, longest, width]; what lies behind the end of a row means nothing."""
        return self._keys[layer][:, :, :longest], self._values[layer][:, :, :longest]

    def keep(self, rows: torch.Tensor) -> None:
        """Forget all rows but these [n] int64."""
        self._rows = len(rows)
        for held in (self._keys, self._values):
            for layer, tensor in held.items():
                held[layer] = tensor[rows]

    def _with_room(self, held: torch.Tensor | None, new: torch.Tensor, longest: int) -> torch.Tensor:
        if held is not None and held.shape[2] >= longest:
            return held
        capacity = min(self._limit, max(longest + GROWTH, longest * 5 // 4))
        _, groups, width = new.shape
        larger = new.new_zeros((self._rows, groups, capacity, width))
        if held is not None:
            larger[:, :, : held.shape[2]] = held
        return larger


@dataclass
class InUse:
    """What the layers of a stage attend over in the step that runs; empty between steps."""

    cache: KeyValueCache | None = None
    step: Step | None = None


class CachedAttention(torch.nn.Module):
    """Causal attention of a step's tokens over those that the cache holds. Called as core calls `core_attention`.

    Args:
        layer: this layer's key in the cache.
        scale: None for 1 / sqrt(width).
        window: tokens that each query sees, itself included; None: all before it.
    """

    def __init__(self, layer: int, scale: float | None, window: int | None, in_use: InUse) -> None:
        super().__init__()
        self._layer, self._scale, self._window, self._in_use = layer, scale, window, in_use

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_core: Any, **_others: Any
    ) -> torch.Tensor:
        """query [t, 1, heads, width], key and value [t, 1, groups, width] -> [t, 1, heads * width].

        t may be above the step's tokens; what comes out for the rest means nothing.
        """
        cache, step = self._in_use.cache, self._in_use.step
        assert cache is not None and step is not None, "only within CachedLayers.reading"
        t, _, heads, width = query.shape
        cache.put(self._layer, key[:, 0], value[:, 0], step)
        keys, values = cache.read(self._layer, step.longest)
        attend = self._prefill if step.first else self._decode
        out = attend(query[: step.tokens, 0], keys, values, step)
        if step.tokens < t:
            out = torch.cat((out, out.new_zeros((t - step.tokens, heads, width))))
        return out.reshape(t, 1, heads * width)

    def _decode(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Step) -> torch.Tensor:
        """[rows, heads, width] -> the same. Heads that share keys go as so many queries: nothing is repeated."""
        rows, heads, width = query.shape
        grouped = query.view(rows, keys.shape[1], -1, width)
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=step.seen(self._window), scale=self._scale)
        return out.reshape(rows, heads, width)

    def _prefill(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Step) -> torch.Tensor:
        """[tokens, heads, width] -> the same: rows side by side, padded at their ends, which causality hides."""
        heads, width = query.shape[1:]
        padded = query.new_zeros((len(step.counts), step.longest, heads, width))
        for row, part in enumerate(query.split(step.counts)):
            padded[row, : step.counts[row]] = part
        mask = None
        if self._window is not None and self._window < step.longest:
            slots = torch.arange(step.longest, device=query.device)
            mask = (slots <= slots[:, None]) & (slots > slots[:, None] - self._window)
        out = scaled_dot_product_attention(
            padded.transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=keys.shape[1] != heads,
        ).transpose(1, 2)
        return torch.cat([out[row, :count] for row, count in enumerate(step.counts)])


class CachedLayers:
    """The layers of a stage (core's TransformerLayers), which can attend over a cache."""

    def __init__(self, layers: Any) -> None:
        self._in_use = InUse()
        self._attentions = [layer.self_attention for layer in layers]
        self._cached = [self._cached_attention(attention) for attention in self._attentions]

    def _cached_attention(self, attention: Any) -> CachedAttention:
        config = attention.config
        window = None if config.window_size is None else config.window_size[0] + 1
        return CachedAttention(attention.layer_number, config.softmax_scale, window, self._in_use)

    @contextmanager
    def reading(self, cache: KeyValueCache, step: Step) -> Iterator[None]:
        """Within the block the layers attend over `cache`, and after it as before."""
        own = [attention.core_attention for attention in self._attentions]
        self._in_use.cache, self._in_use.step = cache, step
        try:
            for attention, cached in zip(self._attentions, self._cached, strict=True):
                attention.core_attention = cached
            yield
        finally:
            for attention, kept in zip(self._attentions, own, strict=True):
                attention.core_attention = kept
            self._in_use.cache = self._in_use.step = None
