"""Megatron-LM's rank files (`mp_rank_XX[_YYY][_ZZZ]/model_optim_rng.pt`): read into a catalog.

Each holds a rank's own tensors under local names. Layers are counted as they are found, so uneven pipelines are read
too; copies that ranks hold of the same tensor are held to be the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.architectures.table import Entry
from checkpoint_tools.catalog import Catalog, Piece, StoredTensor
from checkpoint_tools.dtypes import DType
from checkpoint_tools.formats.inert_pickle import Inert
from checkpoint_tools.formats.megatron_arguments import identity_from_arguments
from checkpoint_tools.formats.rank_cuts import (
    LAYER,
    RANK_FOLDER,
    RankPlace,
    canonical_name,
    rank_cuts,
    rank_shape,
)
from checkpoint_tools.formats.torch_zip import Archive, TensorRecord, is_tensor
from checkpoint_tools.formats.unexpected import check_names, refuse_shape
from checkpoint_tools.record import ConversionRecord, read_record
from foundation.errors import RequestError, WorkError

FILE_NAMES = ("model_optim_rng.pt", "model_rng.pt", "model.pt")
CHECKPOINT_VERSION = 3.0
"""Before it, rows of linear_qkv had another order."""


@dataclass(frozen=True)
class RankFile:
    """One file, read but for its tensors' bytes.

    Attributes:
        name: below the checkpoint's folder.
        chunks: of each virtual stage, tensors by local name.
        arguments: of the training that wrote it.
    """

    name: str
    chunks: tuple[dict[str, TensorRecord], ...]
    arguments: dict[str, Any]
    iteration: int
    has_optimizer: bool


@dataclass
class _Gathered:
    """Pieces of one tensor, from whatever ranks."""

    shape: tuple[int, ...]
    dtype: DType
    pieces: list[Piece] = field(default_factory=list)
    replicas: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """The first to hold a rectangle has it, others hold copies."""
        place = (piece.row, piece.rows, piece.column, piece.columns)
        known = any((one.row, one.rows, one.column, one.columns) == place for one in self.pieces)
        (self.replicas if known else self.pieces).append(piece)

    def stored(self, name: str) -> StoredTensor:
        """The tensor `name`."""
        return StoredTensor(name, self.shape, self.dtype, tuple(self.pieces), tuple(self.replicas))


def read_megatron(folder: Path, vocab_size: int | None = None) -> Catalog:
    """The catalog of a folder of rank files.

    Args:
        vocab_size: the true vocabulary, where nothing in the checkpoint says it.

    Raises:
        RequestError: a family or tensors that are not converted.
        WorkError: a file is missing or damaged.
    """
    record = read_record(folder)
    paths = _paths(folder)
    first = read_rank_file(folder, next(iter(paths.values())))
    identity = _identity(record, first, vocab_size, folder)
    grid = _grid(first, paths, folder)
    entries = {entry.name: entry for entry in identity.entries()}
    gathered: dict[str, _Gathered] = {}
    files = {place: read_rank_file(folder, paths[grid.key(place)]) for place in grid.places()}
    starts = _first_layers(files, grid)
    for place, file in files.items():
        for number, chunk in enumerate(file.chunks):
            for name, tensor in chunk.items():
                expert = place.ep * (identity.dimensions.experts // grid.ep)
                here = canonical_name(name, starts[place.pp, number], expert, identity.dimensions)
                entry = _entry(here, entries, identity, folder, name)
                _gather(gathered, entry, place, grid, tensor, file.name, folder)
    check_names(set(entries), list(gathered), identity.architecture, folder)
    tensors = {name: gathered[name].stored(name) for name in entries}
    notes = ("the optimizer's state in the rank files is left aside",) if first.has_optimizer else ()
    return Catalog(
        "megatron",
        folder,
        identity,
        tensors,
        step=record.step if record else first.iteration,
        tokens=record.tokens if record else 0,
        layout=grid.describe(),
        notes=notes,
        recorded=record.hashes() if record else {},
    )


@dataclass(frozen=True)
class _Grid:
    tp: int
    pp: int
    ep: int

    def places(self) -> Iterator[RankPlace]:
        for pipeline in range(self.pp):
            for tensor in range(self.tp):
                for expert in range(self.ep):
                    yield RankPlace(tensor, pipeline, expert)

    def key(self, place: RankPlace) -> tuple[int, ...]:
        """The numbers in the folder's name."""
        return (place.tp, *((place.pp,) if self.pp > 1 else ()), *((place.ep,) if self.ep > 1 else ()))

    def describe(self) -> str:
        return f"TP{self.tp} x PP{self.pp}" + (f" x EP{self.ep}" if self.ep > 1 else "")


def _paths(folder: Path) -> dict[tuple[int, ...], str]:
    """Rank files by the numbers in their folders' names."""
    found: dict[tuple[int, ...], str] = {}
    for path in sorted(folder.iterdir()):
        match = RANK_FOLDER.fullmatch(path.name)
        if match is None:
            continue
        names = [name for name in FILE_NAMES if (path / name).is_file()]
        if not names:
            raise WorkError(f"{path} holds none of {', '.join(FILE_NAMES)}", cure="use another copy of the checkpoint")
        found[tuple(int(number) for number in match.groups() if number is not None)] = f"{path.name}/{names[0]}"
    return found


def read_rank_file(folder: Path, name: str) -> RankFile:
    """One rank file.

    Raises:
        WorkError: it is damaged, hostile, or none of Megatron-LM's.
    """
    path = folder / name
    descriptor = os.open(path, os.O_RDONLY)
    try:
        archive = Archive(descriptor, path)
        state = archive.value
        if not isinstance(state, dict):
            raise WorkError(f"{path} is no rank file: it holds a {type(state).__name__}")
        numbered = [f"model{number}" for number in range(len(state)) if f"model{number}" in state]
        keys = ["model"] if "model" in state else numbered
        chunks = tuple(_tensors(archive, state[key], path) for key in keys)
        if not any(chunks):
            raise WorkError(f"{path} is no rank file: it has no model in it")
    finally:
        os.close(descriptor)
    version = state.get("checkpoint_version", CHECKPOINT_VERSION)
    if version != CHECKPOINT_VERSION:
        raise RequestError(
            f"{path} has checkpoint_version {version}",
            rule=f"is {CHECKPOINT_VERSION}: older ones have another order of rows",
            cure="load and save it with a current Megatron-LM first",
        )
    arguments = state.get("args")
    held = arguments.state if isinstance(arguments, Inert) and isinstance(arguments.state, dict) else {}
    iteration = state.get("iteration", 0)
    return RankFile(
        name, chunks, held, iteration if isinstance(iteration, int) else 0, isinstance(state.get("optimizer"), dict)
    )


def _tensors(archive: Archive, model: Any, path: Path) -> dict[str, TensorRecord]:
    if not isinstance(model, dict) or "language_model" in model:
        raise RequestError(
            f"{path} holds a model of Megatron-LM's legacy classes",
            rule="models of megatron-core are converted",
            cure="convert it to core's form with the Megatron-LM that wrote it",
        )
    found: dict[str, TensorRecord] = {}
    for name, value in model.items():
        if "_extra_state" in name:
            continue
        if not is_tensor(value):
            raise WorkError(f"{path}: {name} is no tensor", cure="use another copy of the checkpoint")
        found[name] = archive.record(value, name)
    return found


def _identity(record: ConversionRecord | None, first: RankFile, vocab_size: int | None, folder: Path) -> Identity:
    if record is not None:
        return record.identity(str(folder))
    if not first.arguments:
        raise RequestError(
            f"nothing in {folder} says what model it holds",
            rule="args in the rank files say it, or conversion.json",
            cure="name a checkpoint that Megatron-LM or orthant wrote",
        )
    return identity_from_arguments(first.arguments, vocab_size, folder / first.name)


def _grid(first: RankFile, paths: dict[tuple[int, ...], str], folder: Path) -> _Grid:
    """From the names of the folders; whether a second number counts stages or experts, the arguments say."""
    tp = max(key[0] for key in paths) + 1
    pp, ep = 1, 1
    width = max(map(len, paths))
    if width == 3:
        pp, ep = max(key[1] for key in paths) + 1, max(key[2] for key in paths) + 1
    elif width == 2 and first.arguments.get("pipeline_model_parallel_size", 2) > 1:
        pp = max(key[1] for key in paths) + 1
    elif width == 2:
        ep = max(key[1] for key in paths) + 1
    grid = _Grid(tp, pp, ep)
    said = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
    }
    for name, size in said.items():
        if first.arguments.get(name, size) != size:
            raise WorkError(
                f"{folder} has rank files for {name} {size}, and they were written by {first.arguments[name]}",
                cure="fetch the missing files, or use another copy of the checkpoint",
            )
    missing = [place for place in grid.places() if grid.key(place) not in paths]
    if missing:
        name = missing[0].folder(pipeline=pp > 1, experts=ep > 1)
        raise WorkError(
            f"{len(missing)} of {tp * pp * ep} rank files are missing: {name} ...",
            where=str(folder),
            cure="fetch the missing files, or use another copy of the checkpoint",
        )
    return grid


def _first_layers(files: dict[RankPlace, RankFile], grid: _Grid) -> dict[tuple[int, int], int]:
    """The global number of the first layer of each (stage, chunk): stages follow one another within a chunk."""
    chunks = {len(file.chunks) for file in files.values()}
    if len(chunks) > 1:
        raise WorkError(f"rank files differ in how many chunks they hold: {sorted(chunks)}")
    counts: dict[tuple[int, int], set[int]] = {}
    for place, file in files.items():
        for number, chunk in enumerate(file.chunks):
            layers = {int(found.group(1)) for name in chunk if (found := LAYER.fullmatch(name))}
            counts.setdefault((place.pp, number), set()).add(max(layers, default=-1) + 1)
    starts: dict[tuple[int, int], int] = {}
    start = 0
    for number in range(chunks.pop()):
        for stage in range(grid.pp):
            held = counts[stage, number]
            if len(held) > 1:
                raise WorkError(f"ranks of stage {stage} differ in how many layers they hold: {sorted(held)}")
            starts[stage, number] = start
            start += held.pop()
    return starts


def _entry(name: str, entries: dict[str, Entry], identity: Identity, folder: Path, local: str) -> Entry:
    if identity.dimensions.tied and name == "output_layer.weight":
        name = "embedding.word_embeddings.weight"  # the last stage's copy
    if name not in entries:
        raise RequestError(
            f"tensor {local} ({name} in the whole model) is unknown to a {identity.architecture.name}",
            where=str(folder),
            rule="every tensor is converted",
            cure="convert a model of a family that is known; see `orthant convert --help`",
        )
    return entries[name]


def _gather(
    gathered: dict[str, _Gathered],
    entry: Entry,
    place: RankPlace,
    grid: _Grid,
    tensor: TensorRecord,
    file: str,
    folder: Path,
) -> None:
    padded = tensor.shape[0] * grid.tp
    if entry.row.shape[0] == "vocab" and padded < entry.shape[0]:
        raise RequestError(
            f"{entry.name} has {padded} rows over all ranks, and the vocabulary is {entry.shape[0]}",
            where=str(folder),
            rule="every token has a row",
            cure="--vocab-size N, the tokenizer's",
        )
    refuse_shape(f"{entry.name} on a rank of {grid.tp}", tensor.shape, rank_shape(entry, grid.tp, padded), folder)
    whole = gathered.setdefault(entry.name, _Gathered(entry.shape, tensor.dtype))
    if whole.dtype is not tensor.dtype:
        raise WorkError(f"{entry.name} is {whole.dtype.name} on one rank and {tensor.dtype.name} on another")
    for cut in rank_cuts(entry, grid.tp, place.tp, padded):
        whole.add(cut.piece(file, tensor.offset, tensor.dtype))
