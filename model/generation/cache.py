"""Keys and values of tokens already read, and the attention that reads them.

A step of generation lays out the new tokens of all its rows one after another, as a single row: prompts of unequal
length need no padding, and whatever cuts a sequence (sequence parallelism) cuts this one. Only attention has to know
where rows begin; it takes the place of the provider's `core_attention` for the length of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from torch.nn.functional import scaled_dot_product_attention

from model.generation.plain_layer import PlainLayer, Rotation, can_be_plain, rotation

GROWTH = 128
"""Tokens of a row that a cache grows by at least."""


@dataclass(frozen=True)
class Step:
    """The new tokens of a group's rows.

    Attributes:
        first: whether rows are empty so far; then `counts` may differ, else each row has one new token.
        counts: new tokens of each row.
        lengths: [rows] int64, tokens of each row after the step.
        shortest, longest: of `lengths`.
        masks: those that layers have asked for, by their windows.
    """

    first: bool
    counts: tuple[int, ...]
    lengths: torch.Tensor
    shortest: int
    longest: int
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], *, first: bool, device: torch.device) -> Step:
        """A step after which rows have `lengths` tokens."""
        counts = tuple(lengths) if first else (1,) * len(lengths)
        return cls(first, counts, torch.tensor(lengths, device=device), min(lengths), max(lengths))

    @property
    def even(self) -> bool:
        """Whether rows are of one length."""
        return self.shortest == self.longest

    @cached_property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(self.counts)

    @cached_property
    def rows(self) -> torch.Tensor:
        """[tokens] int64: the row of each new token."""
        numbers = torch.arange(len(self.counts), device=self.lengths.device)
        return numbers.repeat_interleave(self.lengths) if self.first else numbers

    @cached_property
    def places(self) -> torch.Tensor:
        """[tokens] int64: the place of each new token in its row."""
        if not self.first:
            return self.lengths - 1
        begins = self.lengths.cumsum(0) - self.lengths
        return torch.arange(self.tokens, device=self.lengths.device) - begins[self.rows]

    @cached_property
    def padded_places(self) -> torch.Tensor:
        """[tokens] int64: the place of each new token where every row takes `longest` places."""
        return self.rows * self.longest + self.places

    def seen(self, window: int | None) -> torch.Tensor | None:
        """[rows, 1, 1, longest] bool: what the newest token of each row attends to; None: all there is."""
        if window not in self.masks:
            self.masks[window] = self._seen(window)
        return self.masks[window]

    def _seen(self, window: int | None) -> torch.Tensor | None:
        if self.even and (window is None or window >= self.longest):
            return None
        slots = torch.arange(self.longest, device=self.lengths.device)
        seen = slots < self.lengths[:, None]
        if window is not None:
            seen &= slots >= self.lengths[:, None] - window
        return seen[:, None, None]


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
        """Write the new tokens [tokens, groups, width] of `step`."""
        for held, new in ((self._keys, keys), (self._values, values)):
            tensor = held[layer] = self._with_room(held.get(layer), new, step.longest)
            if step.even:
                each = step.counts[0]
                rows = new.unflatten(0, (self._rows, each)).transpose(1, 2)
                tensor[:, :, step.longest - each : step.longest] = rows
            else:
                tensor[step.rows, :, step.places] = new

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
    rotation: Rotation | None = None


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
        assert self._in_use.step is not None, "only within CachedLayers.reading"
        t, tokens = query.shape[0], self._in_use.step.tokens
        grouped = query[:tokens, 0].unflatten(1, (key.shape[2], -1))
        out = self.attend(grouped, key[:tokens, 0], value[:tokens, 0])
        if tokens < t:
            out = torch.cat((out, out.new_zeros((t - tokens, out.shape[1]))))
        return out[:, None]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [tokens, groups, heads of a group, width], key and value [tokens, groups, width] of the step ->
        [tokens, heads * width]."""
        cache, step = self._in_use.cache, self._in_use.step
        assert cache is not None and step is not None, "only within CachedLayers.reading"
        cache.put(self._layer, key, value, step)
        keys, values = cache.read(self._layer, step.longest)
        if step.first:
            return self._prefill(query.flatten(1, 2), keys, values, step)
        # Heads that share keys go as so many queries: nothing is repeated.
        mask = step.seen(self._window)
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self._scale).flatten(1)

    def _prefill(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Step) -> torch.Tensor:
        """[tokens, heads, width] -> [tokens, heads * width]: rows side by side, padded at their ends, which causality
        hides."""
        padded = query
        if not step.even:
            padded = query.new_zeros((len(step.counts) * step.longest, *query.shape[1:]))
            padded[step.padded_places] = query
        mask = None
        if self._window is not None and self._window < step.longest:
            slots = torch.arange(step.longest, device=query.device)
            mask = (slots <= slots[:, None]) & (slots > slots[:, None] - self._window)
        out = scaled_dot_product_attention(
            padded.unflatten(0, (-1, step.longest)).transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=keys.shape[1] != query.shape[1],
        )
        rows = out.transpose(1, 2).flatten(2).flatten(0, 1)  # [rows * longest, heads * width]
        return rows if step.even else rows[step.padded_places]


class CachedLayers:
    """The layers of a stage (core's TransformerLayers), which can attend over a cache.

    Args:
        layers: of core's block.
    """

    def __init__(self, layers: Any) -> None:
        self._in_use = InUse()
        self._layers = list(layers)
        self._attentions = [self._cached_attention(layer.self_attention) for layer in self._layers]
        self._plain = [
            PlainLayer(layer, attention.attend, self._rotation) if can_be_plain(layer) else None
            for layer, attention in zip(self._layers, self._attentions, strict=True)
        ]

    def _cached_attention(self, attention: Any) -> CachedAttention:
        config = attention.config
        window = None if config.window_size is None else config.window_size[0] + 1
        return CachedAttention(attention.layer_number, config.softmax_scale, window, self._in_use)

    def _rotation(self, angles: torch.Tensor) -> Rotation:
        """Of the step's tokens; the same for all layers."""
        if self._in_use.rotation is None:
            config = self._layers[0].config
            factor = _yarn_get_concentration_factor_from_config(config)
            self._in_use.rotation = rotation(angles, factor, config.params_dtype)
        return self._in_use.rotation

    @contextmanager
    def reading(self, cache: KeyValueCache, step: Step) -> Iterator[None]:
        """Within the block the layers attend over `cache`, and after it as before.

        And compute in BF16: a step has any number of tokens, FP8's products take multiples of 16, and Transformer
        Engine's layers would go on with weights that they quantised before the last update.
        """
        swapped, core = [], self._layers[0].config
        fp8, core.fp8 = core.fp8, None
        self._in_use.cache, self._in_use.step = cache, step
        try:
            for layer, attention, plain in zip(self._layers, self._attentions, self._plain, strict=True):
                if plain is not None and not plain.waits_for_weights:
                    vars(layer)["forward"] = plain
                    continue
                swapped.append((layer.self_attention, layer.self_attention.core_attention))
                layer.self_attention.core_attention = attention
            yield
        finally:
            core.fp8 = fp8
            for layer in self._layers:
                vars(layer).pop("forward", None)
            for of_layer, own in swapped:
                of_layer.core_attention = own
            self._in_use.cache = self._in_use.step = self._in_use.rotation = None
