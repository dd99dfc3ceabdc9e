"""Core's `torch_dist`, ours and Megatron-LM's: read into a catalog.

`.metadata` says which chunk of which tensor lies where; every chunk is an archive of torch's. Layers (and experts) of a
homogeneous decoder are stacked along leading axes of one key, or have keys of their own; both are read.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.catalog import OPTIMIZER_PREFIX, Catalog, Piece, StoredTensor
from checkpoint_tools.dtypes import DType
from checkpoint_tools.formats.inert_pickle import Inert, load_inert
from checkpoint_tools.formats.megatron_arguments import identity_from_arguments
from checkpoint_tools.formats.torch_zip import Archive, is_tensor
from checkpoint_tools.formats.unexpected import check_names, refuse_shape
from checkpoint_tools.manifest import MANIFEST, TOKENIZER, read_manifest
from checkpoint_tools.reading import opened
from checkpoint_tools.record import read_record
from foundation.errors import RequestError, WorkError

METADATA, COMMON = ".metadata", "common.pt"
SCORE_HEAD = "score_head.weight"
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
STACKED = (("decoder.layers.", "decoder.layers."), (".mlp.experts.experts.", ".mlp.experts.local_experts."))
"""What a key leaves an index out behind, in the order of the stacked axes, and what it follows in canonical names."""
NOT_TENSORS = re.compile(r".*(_extra_state|rng_state|rerun_state).*")
NOT_CONVERTIBLE = re.compile(r"optimizer\.(distributed|state\.fp32_param\.flat|.*dp_group_idx|.*gbuf)")


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor by its key, and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Found:
    """What `.metadata` says.

    Attributes:
        tensors: by key, (shape, chunks).
        others: keys of what is no tensor.
    """

    tensors: dict[str, tuple[tuple[int, ...], list[Chunk]]]
    others: list[str]


def read_distributed(folder: Path, vocab_size: int | None = None) -> Catalog:
    """The catalog of a distributed checkpoint.

    Args:
        vocab_size: the true vocabulary, where nothing in the checkpoint says it.

    Raises:
        RequestError: a family or tensors that are not converted.
        WorkError: a file is missing or damaged.
    """
    facts = _facts(folder, vocab_size)
    found = read_metadata(folder)
    weights, state, notes = _sorted_keys(found)
    identity = facts.identity
    tensors = _read(weights, folder, identity)
    wanted = {entry.name: entry.shape for entry in identity.entries()}
    if facts.head == "score":
        wanted.pop(VOCABULARY[1], None)
        wanted[SCORE_HEAD] = (1, identity.dimensions.hidden)
    check_names(set(wanted), list(tensors), identity.architecture, folder)
    for name, shape in wanted.items():
        refuse_shape(name, tensors[name].shape, shape, folder)
    ordered = {name: tensors[name] for name in wanted}
    moments = _read(state, folder, identity)
    strange = next((name for name, one in moments.items() if one.shape != wanted.get(_without_prefix(name)[1])), None)
    if strange is not None:
        notes.append(
            f"the optimizer's state is left aside: {strange} is of no weight of the model, or of another shape"
        )
        moments = {}
    return Catalog(
        "distributed",
        folder,
        identity,
        ordered | moments,
        step=facts.step,
        tokens=facts.tokens,
        layout=facts.layout,
        notes=tuple(notes),
        recorded=facts.recorded,
    )


@dataclass(frozen=True)
class _Facts:
    identity: Identity
    step: int = 0
    tokens: int = 0
    layout: str | None = None
    recorded: Mapping[str, str] = ()  # type: ignore[assignment]
    head: str = "tokens"


def _facts(folder: Path, vocab_size: int | None) -> _Facts:
    """Whose weights: from the converter's record, from our manifest, or from Megatron-LM's arguments."""
    record = read_record(folder)
    if record is not None:
        identity = record.identity(str(folder))
        return _Facts(identity, record.step, record.tokens, record.layout, record.hashes())
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        model = manifest.model.model_copy(update={"vocab_size": manifest.vocab_size})
        layout = manifest.saved_at.get("layout")
        return _Facts(Identity.from_model(model), manifest.step, manifest.tokens, layout, {}, manifest.head)
    path = folder / COMMON
    if (folder / TOKENIZER).is_dir():  # as no one else's has it
        raise WorkError(f"{folder / MANIFEST} is missing", cure="use another copy of the checkpoint")
    if not path.is_file():
        raise WorkError(f"{path} is missing", cure="use another copy of the checkpoint")
    with _opened(path) as descriptor:
        common = Archive(descriptor, path).value
    arguments = common.get("args") if isinstance(common, dict) else None
    if not isinstance(arguments, Inert) or not isinstance(arguments.state, dict):
        raise RequestError(
            f"nothing in {folder} says what model it holds",
            rule=f"{MANIFEST} (ours), conversion.json (the converter's) or args in {COMMON} (Megatron-LM's) say it",
            cure="name a checkpoint that was written by a training, not a copy of its tensors alone",
        )
    identity = identity_from_arguments(arguments.state, vocab_size, path)
    step = common.get("iteration", 0)
    return _Facts(identity, step if isinstance(step, int) else 0, 0, None, {})


class _opened:
    """A descriptor for reading, closed at the end."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._descriptor = opened(self._path, os.O_RDONLY)
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def read_metadata(folder: Path) -> Found:
    """What `.metadata` says of keys, chunks and files.

    Raises:
        WorkError: it is missing, damaged, hostile, or a chunk lies nowhere.
    """
    path = folder / METADATA
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise WorkError(f"{path} is missing", cure="use another copy of the checkpoint") from error
    metadata = load_inert(data, path)
    try:
        places = {
            (index.field("fqn"), _offset(index.field("offset"))): info
            for index, info in metadata.field("storage_data").items()
        }
        ends: dict[str, int] = {}
        for (key, _), info in places.items():
            file, end = _place(key, info)
            ends[file] = max(ends.get(file, 0), end)
        tensors: dict[str, tuple[tuple[int, ...], list[Chunk]]] = {}
        others: list[str] = []
        for key, described in metadata.field("state_dict_metadata").items():
            if not described.reference.endswith("TensorStorageMetadata"):
                others.append(key)
                continue
            chunks = [_chunk(key, chunk, places) for chunk in described.field("chunks")]
            tensors[key] = (_extents(described.field("size")), chunks)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise WorkError(f"{path} is damaged: {error}", cure="use another copy of the checkpoint") from error
    _refuse_short_files(folder, ends)
    return Found(tensors, others)


def _refuse_short_files(folder: Path, ends: Mapping[str, int]) -> None:
    """Raise where a file is missing or ends before what lies in it does."""
    missing = sorted(file for file in ends if not (folder / file).is_file())
    if missing:
        raise WorkError(
            f"{len(missing)} files of the checkpoint are missing: {', '.join(missing[:5])}",
            where=str(folder),
            cure="use another copy of the checkpoint",
        )
    for file, end in ends.items():
        size = (folder / file).stat().st_size
        if size < end:
            raise WorkError(
                f"{folder / file} is cut off: it has {size} bytes, and what lies in it ends at {end}",
                cure="use another copy of the checkpoint",
            )


def _place(key: str, info: Inert) -> tuple[str, int]:
    """(file, end) of what is stored under `key`."""
    file = info.field("relative_path")
    if not isinstance(file, str) or "/" in file or file.startswith("."):
        raise ValueError(f"{key} lies in {file!r}, which is no file of this folder")
    return file, int(info.field("offset")) + int(info.field("length"))


def _offset(offset: Any) -> tuple[int, ...] | None:
    return None if offset is None else tuple(offset)


def _extents(values: Any) -> tuple[int, ...]:
    extents = tuple(values)
    if not extents or any(type(extent) is not int or extent < 0 for extent in extents):
        raise ValueError(f"{list(extents)} are no sizes or places")
    return extents


def _chunk(key: str, chunk: Inert, places: Mapping[Any, Inert]) -> Chunk:
    offsets, sizes = _extents(chunk.field("offsets")), _extents(chunk.field("sizes"))
    if len(offsets) != len(sizes):
        raise ValueError(f"{key} has a part of {list(sizes)} at {list(offsets)}")
    info = places[key, offsets]
    if info.field("transform_descriptors"):
        raise ValueError(f"{key} is stored transformed by {info.field('transform_descriptors')}")
    return Chunk(offsets, sizes, info.field("relative_path"), int(info.field("offset")), int(info.field("length")))


Keyed = dict[str, tuple[tuple[int, ...], list[Chunk]]]


def _sorted_keys(found: Found) -> tuple[Keyed, Keyed, list[str]]:
    """(weights, optimizer state, what is left aside)."""
    weights: Keyed = {}
    state: Keyed = {}
    aside = [key for key in found.others if not NOT_TENSORS.fullmatch(key)]
    flat: list[str] = []
    for key, stored in found.tensors.items():
        if NOT_CONVERTIBLE.match(key):
            flat.append(key)
        elif key.startswith(OPTIMIZER_PREFIX):
            state[key] = stored
        elif NOT_TENSORS.fullmatch(key):
            aside.append(key)
        else:
            weights[key] = stored
    notes = [f"left aside: {', '.join(aside[:5])}"] if aside else []
    if flat:
        notes.append(
            "the optimizer's state is in flat buffers of the layout that wrote it and is left aside; "
            "--dist-ckpt-optim-fully-reshardable of Megatron-LM writes one that can be converted"
        )
    return weights, state, notes


def _read(keyed: Keyed, folder: Path, identity: Identity) -> dict[str, StoredTensor]:
    """The tensors of the whole model behind keys."""
    pieces: dict[str, list[Piece]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, DType] = {}
    with ExitStack() as stack:
        descriptors: dict[str, int] = {}
        for key, (shape, chunks) in keyed.items():
            prefix, plain = _without_prefix(key)
            stacked = stacked_axes(plain)
            for chunk in chunks:
                if chunk.file not in descriptors:
                    descriptors[chunk.file] = stack.enter_context(_opened(folder / chunk.file))
                first, dtype = _first_byte(descriptors[chunk.file], folder / chunk.file, chunk, key)
                for index, start in _layers_of(chunk, stacked):
                    name = prefix + canonical_name(plain, index)
                    if dtypes.setdefault(name, dtype) is not dtype:
                        raise WorkError(f"{key} is {dtypes[name].name} in one part and {dtype.name} in another")
                    shapes[name] = _true_shape(name, shape[stacked:], identity)
                    piece = _piece(chunk, stacked, shape, first + start * dtype.size, key)
                    clipped = _without_padding(piece, shapes[name][0])
                    if clipped is not None:
                        pieces.setdefault(name, []).append(clipped)
    return {name: StoredTensor(name, shapes[name], dtypes[name], tuple(pieces.get(name, ()))) for name in shapes}


def _without_prefix(key: str) -> tuple[str, str]:
    if not key.startswith(OPTIMIZER_PREFIX):
        return "", key
    kind, _, rest = key.removeprefix(OPTIMIZER_PREFIX).partition(".")
    return f"{OPTIMIZER_PREFIX}{kind}.", rest


def stacked_axes(key: str) -> int:
    """How many leading axes of `key` count layers and experts."""
    parted = [key.partition(stacked) for stacked, _ in STACKED]
    return sum(bool(found) and not after[:1].isdigit() for _, found, after in parted)


def canonical_name(key: str, indices: tuple[int, ...]) -> str:
    """The name of one tensor behind `key`, with the indices of the stacked axes in it."""
    left = list(indices)
    for stacked, named in STACKED:
        before, found, after = key.partition(stacked)
        if found:
            key = f"{before}{named}{after}" if after[:1].isdigit() else f"{before}{named}{left.pop(0)}.{after}"
    return key


def _layers_of(chunk: Chunk, stacked: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(index along the stacked axes, first element in the chunk) of every tensor that the chunk holds part of."""
    each = math.prod(chunk.sizes[stacked:])
    ranges = [range(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)][:stacked]
    for number, index in enumerate(itertools.product(*ranges)):
        yield index, number * each


def _first_byte(descriptor: int, path: Path, chunk: Chunk, key: str) -> tuple[int, DType]:
    archive = Archive(descriptor, path, chunk.start, chunk.length)
    if not is_tensor(archive.value):
        raise WorkError(f"{path} is damaged: where {key} should be is no tensor")
    record = archive.record(archive.value, key)
    if math.prod(record.shape) != math.prod(chunk.sizes):
        raise WorkError(f"{path} is damaged: {key} is {list(record.shape)} there, not {list(chunk.sizes)}")
    return record.offset, record.dtype


def _true_shape(name: str, shape: tuple[int, ...], identity: Identity) -> tuple[int, ...]:
    """Without rows that pad the vocabulary; where there are too few, the shape tells."""
    if _without_prefix(name)[1] in VOCABULARY:
        return (min(shape[0], identity.dimensions.vocab), *shape[1:])
    return shape


def _piece(chunk: Chunk, stacked: int, shape: tuple[int, ...], offset: int, key: str) -> Piece:
    offsets, sizes, whole = chunk.offsets[stacked:], chunk.sizes[stacked:], shape[stacked:]
    if len(whole) == 1:
        return Piece(chunk.file, offset, offsets[0], sizes[0], 0, 1)
    if len(whole) != 2:
        raise WorkError(f"{key} has {len(whole)} axes: matrices and vectors are converted")
    return Piece(chunk.file, offset, offsets[0], sizes[0], offsets[1], sizes[1])


def _without_padding(piece: Piece, rows: int) -> Piece | None:
    kept = min(piece.rows, rows - piece.row)
    return None if kept <= 0 else Piece(piece.file, piece.offset, piece.row, kept, piece.column, piece.columns)
