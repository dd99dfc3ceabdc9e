"""What of a tensor a tensor-parallel rank holds, and under which names and in which files Megatron-LM keeps it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from checkpoint_tools.architectures.table import Dimensions, Entry
from checkpoint_tools.catalog import Piece
from checkpoint_tools.dtypes import DType

RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
RANK_FILE = "model_optim_rng.pt"
LOCAL_NORMS = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
)
"""Norms that Transformer Engine fuses into the linear layer behind them, and what core's local layers call them."""
DIVISOR = 128
"""Megatron-LM's make_vocab_size_divisible_by."""
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
ONE_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.(linear_fc[12])\.weight|(linear_fc[12])\.weight(\d+))")


@dataclass(frozen=True)
class RankPlace:
    """A rank of the grid that its file is for."""

    tp: int
    pp: int
    ep: int

    def folder(self, *, pipeline: bool, experts: bool) -> str:
        """Megatron-LM's name for it; a coordinate that the grid does not have is left out."""
        name = f"mp_rank_{self.tp:02d}"
        return name + (f"_{self.pp:03d}" if pipeline else "") + (f"_{self.ep:03d}" if experts else "")


@dataclass(frozen=True)
class RankGrid:
    """What rank files are cut for."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    local_names: bool = False

    def describe(self) -> str:
        """For people."""
        parts = [f"TP{self.tp}", f"PP{self.pp}"]
        parts += [f"VPP{self.vpp}"] if self.vpp > 1 else []
        parts += [f"EP{self.ep}"] if self.ep > 1 else []
        return " x ".join(parts)

    def padded_rows(self, vocab: int) -> int:
        """Rows of the embedding, Megatron-LM's rule."""
        multiple = DIVISOR * self.tp
        return -(-vocab // multiple) * multiple

    def places(self) -> Iterator[RankPlace]:
        for pipeline in range(self.pp):
            for tensor in range(self.tp):
                for expert in range(self.ep):
                    yield RankPlace(tensor, pipeline, expert)


ONE_RANK = RankGrid()


@dataclass(frozen=True, slots=True)
class Cut:
    """A rectangle of the whole tensor that is contiguous in a rank's.

    Attributes:
        first: of its elements in the rank's tensor.
        row, rows, column, columns: in the whole tensor.
    """

    first: int
    row: int
    rows: int
    column: int
    columns: int

    def piece(self, file: str, offset: int, dtype: DType) -> Piece:
        """Where it lies if the rank's tensor begins at `offset` of `file`."""
        return Piece(file, offset + self.first * dtype.size, self.row, self.rows, self.column, self.columns)


def rank_shape(entry: Entry, tp: int, padded_rows: int) -> tuple[int, ...]:
    """The shape of a tensor on each of `tp` ranks.

    Args:
        padded_rows: of the embedding.
    """
    rows = padded_rows if entry.row.shape[0] == "vocab" else entry.shape[0]
    if entry.row.split is None:
        return entry.shape
    if entry.row.split == 0:
        return (rows // tp, *entry.shape[1:])
    return (entry.shape[0], entry.shape[1] // tp)


def rank_cuts(entry: Entry, tp: int, rank: int, padded_rows: int) -> list[Cut]:
    """What rank `rank` of `tp` holds, without rows that pad the vocabulary.

    Gate and up are cut separately: a rank holds its part of one over its part of the other.
    """
    columns = math.prod(entry.shape[1:])
    if entry.row.split is None:
        return [Cut(0, 0, entry.shape[0], 0, columns)]
    shape = rank_shape(entry, tp, padded_rows)
    if entry.row.split == 1:
        return [Cut(0, 0, shape[0], rank * shape[1], shape[1])]
    if entry.row.join == "halves":
        half = shape[0] // 2
        return [
            Cut(number * half * columns, number * (entry.shape[0] // 2) + rank * half, half, 0, columns)
            for number in range(2)
        ]
    first = rank * shape[0]
    rows = min(shape[0], entry.shape[0] - first)
    return [Cut(0, first, rows, 0, columns)] if rows > 0 else []


def rank_name(entry: Entry, layer: int | None, expert: int | None, *, local_names: bool) -> str:
    """The name of a tensor in a rank file: with the layer's number on its stage, the expert's on its rank."""
    name = entry.name
    if entry.layer is not None:
        name = name.replace(f"layers.{entry.layer}.", f"layers.{layer}.", 1)
    if entry.expert is not None:
        name = name.replace(f"local_experts.{entry.expert}.", f"local_experts.{expert}.", 1)
    for fused, separate in LOCAL_NORMS if local_names else ():
        if name.endswith(fused):
            name = name.removesuffix(fused) + separate
    return name


def canonical_name(name: str, first_layer: int, first_expert: int, dimensions: Dimensions) -> str:
    """The inverse of `rank_name`; core's grouped experts (`linear_fc1.weight3`) are known too."""
    found = LAYER.fullmatch(name)
    if found is None:
        return name
    layer, rest = int(found.group(1)) + first_layer, found.group(2)
    for fused, separate in LOCAL_NORMS if not dimensions.experts else LOCAL_NORMS[:1]:
        if rest == separate:
            rest = fused
    expert = ONE_EXPERT.fullmatch(rest)
    if expert is not None:
        number, one, grouped, grouped_number = expert.groups()
        rest = f"mlp.experts.local_experts.{int(number or grouped_number) + first_expert}.{one or grouped}.weight"
    return f"decoder.layers.{layer}.{rest}"
