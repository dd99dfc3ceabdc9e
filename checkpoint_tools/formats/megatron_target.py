"""Lay out Megatron-LM's rank files for a grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.architectures.table import Dimensions, Entry
from checkpoint_tools.catalog import Catalog, Piece, StoredTensor
from checkpoint_tools.dtypes import DType
from checkpoint_tools.formats.detect_names import TRACKER
from checkpoint_tools.formats.megatron_arguments import arguments_of, unsaid
from checkpoint_tools.formats.pickle_writer import Made, Named
from checkpoint_tools.formats.rank_cuts import RANK_FILE, RankGrid, RankPlace, rank_cuts, rank_name, rank_shape
from checkpoint_tools.formats.torch_zip import plan_archive, tensor_call
from checkpoint_tools.target import OutputFile, Target, in_parts
from foundation.errors import RequestError

EXTRA_STATES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class _Held:
    """A tensor on a rank."""

    chunk: int
    name: str
    entry: Entry


def plan_megatron(source: Catalog, dtypes: Mapping[str, DType], grid: RankGrid) -> Target:
    """Lay out rank files for the weights of `source`.

    Raises:
        RequestError: the grid does not go with the model.
    """
    identity: Identity = source.identity
    check_grid(identity.dimensions, grid)
    entries = identity.entries()
    padded = grid.padded_rows(identity.dimensions.vocab)
    folder = f"iter_{source.step:07d}" if source.step else "release"
    pieces: dict[str, list[Piece]] = {entry.name: [] for entry in entries}
    files: list[OutputFile] = []
    for place in grid.places():
        held = list(_held(entries, place, grid, identity.dimensions))
        name = f"{folder}/{place.folder(pipeline=grid.pp > 1, experts=grid.ep > 1)}/{RANK_FILE}"
        shapes = [rank_shape(one.entry, grid.tp, padded) for one in held]
        sizes = [math.prod(shape) * dtypes[one.entry.name].size for one, shape in zip(held, shapes, strict=True)]
        archive = plan_archive(_state(held, shapes, dtypes, source, grid, padded), sizes)
        files.append(OutputFile(name, archive.size, archive.literals))
        for one, offset in zip(held, archive.storages, strict=True):
            for cut in rank_cuts(one.entry, grid.tp, place.tp, padded):
                pieces[one.entry.name].append(cut.piece(name, offset, dtypes[one.entry.name]))
    tensors = {entry.name: _stored(entry, dtypes[entry.name], pieces[entry.name]) for entry in entries}
    notes: tuple[str, ...] = ()
    if source.optimizer_state:
        notes = ("rank files take weights only: the optimizer's state is left aside",)
    missing = unsaid(identity)
    if missing is not None:
        notes += (f"Megatron-LM's arguments cannot say {missing}: only conversion.json beside the rank files does",)
    return Target(
        "megatron",
        tuple(files),
        tensors,
        in_parts(tensors.values()),
        {TRACKER: folder.removeprefix("iter_").lstrip("0").encode() or b"0"},
        layout=grid.describe(),
        notes=notes,
        beside=folder,
    )


def check_grid(dimensions: Dimensions, grid: RankGrid) -> None:
    """Refuse a grid that does not go with a model."""
    shared = {
        "query heads": dimensions.heads,
        "query groups": dimensions.groups,
        "the feed-forward width": dimensions.ffn,
    }
    for what, count in shared.items():
        if count % grid.tp:
            usable = [size for size in range(1, grid.tp) if all(other % size == 0 for other in shared.values())]
            raise RequestError(
                f"--tp {grid.tp} is refused", rule=f"divides {what}: {count}", cure=f"--tp {max(usable, default=1)}"
            )
    chunks = grid.pp * grid.vpp
    if grid.vpp > 1 and grid.pp == 1:
        raise RequestError(f"--vpp {grid.vpp} is refused", rule="virtual chunks need --pp 2 or more", cure="--vpp 1")
    if dimensions.num_layers % chunks:
        raise RequestError(
            f"--pp {grid.pp} --vpp {grid.vpp} is refused",
            rule=f"their product divides the {dimensions.num_layers} layers",
            cure=f"--pp {max(size for size in range(1, grid.pp + 1) if dimensions.num_layers % size == 0)} --vpp 1",
        )
    if grid.ep > 1 and (not dimensions.experts or dimensions.experts % grid.ep):
        raise RequestError(
            f"--ep {grid.ep} is refused", rule=f"divides the model's experts: {dimensions.experts}", cure="--ep 1"
        )


def _held(entries: list[Entry], place: RankPlace, grid: RankGrid, dimensions: Dimensions) -> Iterator[_Held]:
    """The tensors of a rank, chunk by chunk; layers are dealt out as core's interleaved schedule does."""
    size = dimensions.num_layers // (grid.pp * grid.vpp)
    experts = dimensions.experts // grid.ep
    for chunk in range(grid.vpp):
        number = chunk * grid.pp + place.pp
        last = number == grid.pp * grid.vpp - 1
        for entry in entries:
            if entry.layer is None:
                is_embedding = entry.name.startswith("embedding.")
                if is_embedding and last and dimensions.tied and number > 0:
                    yield _Held(chunk, "output_layer.weight", entry)
                if (number == 0) if is_embedding else last:
                    yield _Held(chunk, entry.name, entry)
                continue
            mine = entry.expert is None or entry.expert // experts == place.ep
            if entry.layer // size == number and mine:
                expert = None if entry.expert is None else entry.expert % experts
                yield _Held(chunk, rank_name(entry, entry.layer % size, expert, local_names=grid.local_names), entry)


def _state(
    held: list[_Held],
    shapes: list[tuple[int, ...]],
    dtypes: Mapping[str, DType],
    source: Catalog,
    grid: RankGrid,
    padded: int,
) -> dict[str, Any]:
    """What a rank file holds, in the terms of `pickle_writer`."""
    models: list[dict[str, Any]] = [{} for _ in range(grid.vpp)]
    for number, (one, shape) in enumerate(zip(held, shapes, strict=True)):
        models[one.chunk][one.name] = tensor_call(number, shape, dtypes[one.entry.name])
        linear = one.name.removesuffix(".weight")
        if not grid.local_names and linear.endswith(EXTRA_STATES):
            models[one.chunk][f"{linear}._extra_state"] = None  # Transformer Engine's layers ask for it
    keys = ["model"] if grid.vpp == 1 else [f"model{number}" for number in range(grid.vpp)]
    common = next(iter(dtypes.values()))
    arguments = arguments_of(source.identity, grid, padded, common)
    return {
        "args": Made(Named("argparse", "Namespace"), arguments),
        "checkpoint_version": 3.0,
        "iteration": source.step,
        **dict(zip(keys, models, strict=True)),
    }


def _stored(entry: Entry, dtype: DType, pieces: list[Piece]) -> StoredTensor:
    """The first to hold a rectangle has it, others hold copies."""
    first: dict[tuple[int, ...], Piece] = {}
    copies = [piece for piece in pieces if first.setdefault((piece.row, piece.rows, piece.column), piece) is not piece]
    return StoredTensor(entry.name, entry.shape, dtype, tuple(first.values()), tuple(copies))
