"""Lay out a distributed checkpoint: one chunk for each tensor of each layer, so that no layout is in it.

Layers and experts are stacked along leading axes of one key, as core expects of a homogeneous decoder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.architectures.table import Entry
from checkpoint_tools.catalog import OPTIMIZER_PREFIX, Catalog, Piece, StoredTensor
from checkpoint_tools.dtypes import DType
from checkpoint_tools.formats.distributed import COMMON, METADATA
from checkpoint_tools.formats.pickle_writer import Call, Made, Named, Pairs, pickled, written
from checkpoint_tools.formats.torch_zip import joined, plan_archive, tensor_call
from checkpoint_tools.reading import unreadable_named
from checkpoint_tools.target import OutputFile, Target

FILE_BYTES = 512 << 20
LEAST_FILE_BYTES = 32 << 20
FILES = 8
"""A small checkpoint is cut into about so many files, so that as many processes can write."""
LINEAR_LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
TORCH = "torch.distributed.checkpoint"
PADDING_MULTIPLE = 128
NO_TENSOR = written(Made(Named(f"{TORCH}.metadata", "BytesStorageMetadata"), {}))


@dataclass(frozen=True)
class _Key:
    """A tensor as a checkpoint keys it.

    Attributes:
        key: without the indices of layer and expert.
        index: these, and how many there are of each.
        shape: of one layer's tensor, padding of the vocabulary included.
    """

    key: str
    index: tuple[int, ...]
    counts: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def whole(self) -> tuple[int, ...]:
        return self.counts + self.shape

    @property
    def chunk(self) -> tuple[int, ...]:
        return (1,) * len(self.counts) + self.shape

    @property
    def offsets(self) -> tuple[int, ...]:
        return self.index + (0,) * len(self.shape)


def plan_distributed(source: Catalog, dtypes: Mapping[str, DType]) -> Target:
    """Lay out a distributed checkpoint for the weights of `source`, and its optimizer state where that is whole.

    Args:
        dtypes: of each tensor in the target.
    """
    identity: Identity = source.identity
    wanted = list(_wanted(source))
    planner = _Planner(sum(math.prod(key.shape) * dtypes[name].size for name, key in wanted))
    for name, key in wanted:
        planner.add(name, source.tensors[name].shape, dtypes[name], key)
    for key_, bytes_ in _extra_states(identity):
        planner.add_bytes(key_, bytes_)
    files = planner.finished()
    texts = {
        METADATA: planner.metadata(),
        "metadata.json": json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        ).encode(),
        COMMON: _common(source),
    }
    return Target("distributed", files, planner.tensors, tuple(planner.parts), texts, hash_files=True)


def _common(source: Catalog) -> bytes:
    """What is not in tensors: the optimizer's groups go with its state."""
    if not source.optimizer_state:
        return _archive_of({"iteration": source.step})
    with unreadable_named(source.folder / COMMON):
        return (source.folder / COMMON).read_bytes()


def padded_rows(identity: Identity) -> int:
    """Rows of the embedding."""
    vocab = identity.dimensions.vocab
    if identity.model is None:
        return -(-vocab // PADDING_MULTIPLE) * PADDING_MULTIPLE
    return identity.model.padded_vocab_size(vocab, 1)


def _wanted(source: Catalog) -> Iterator[tuple[str, _Key]]:
    """Canonical name and key of everything that goes into the target, in order."""
    identity: Identity = source.identity
    entries = identity.entries()
    rows = padded_rows(identity)
    keys = {entry.name: _key(entry, identity, rows) for entry in entries}
    yield from keys.items()
    for name in source.optimizer_state:
        kind, _, weight = name.removeprefix(OPTIMIZER_PREFIX).partition(".")
        key = keys[weight]
        yield name, _Key(f"{OPTIMIZER_PREFIX}{kind}.{key.key}", key.index, key.counts, key.shape)


def _key(entry: Entry, identity: Identity, rows: int) -> _Key:
    shape = (rows, *entry.shape[1:]) if entry.row.shape[0] == "vocab" else entry.shape
    key = re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", entry.name)
    key = re.sub(r"\.local_experts\.\d+\.", ".experts.", key)
    places = (
        (entry.layer, identity.dimensions.num_layers),
        (entry.expert, identity.dimensions.experts),
    )
    present = [(index, count) for index, count in places if index is not None]
    return _Key(key, tuple(index for index, _ in present), tuple(count for _, count in present), shape)


def _extra_states(identity: Identity) -> Iterator[tuple[str, bytes]]:
    """Core's linear layers store an empty object each, and do not load where it is missing."""
    empty = _archive_of([None])
    layers, experts = identity.dimensions.num_layers, identity.dimensions.experts
    for layer in range(layers):
        for linear in LINEAR_LAYERS:
            if linear in ("linear_qkv", "linear_proj"):
                yield f"decoder.layers.self_attention.{linear}._extra_state/shard_{layer}_{layers}", empty
            elif not experts:
                yield f"decoder.layers.mlp.{linear}._extra_state/shard_{layer}_{layers}", empty
            for expert in range(experts if linear in ("linear_fc1", "linear_fc2") else 0):
                key = f"decoder.layers.mlp.experts.experts.{linear}._extra_state"
                yield f"{key}/shard_{layer}.{expert}_{layers}.{experts}", empty


def _archive_of(value: Any) -> bytes:
    """A whole archive that holds no tensor."""
    return b"".join(data for _, data in plan_archive(value, []).literals)


class _Planner:
    """Puts archives one after the other into files, and keeps what `.metadata` says of them."""

    def __init__(self, total: int) -> None:
        self._limit = min(FILE_BYTES, max(LEAST_FILE_BYTES, total // FILES))
        self._files: list[OutputFile] = []
        self._literals: list[tuple[int, bytes]] = []
        self._size = 0
        self._described: dict[str, Any] = {}
        self._chunks: dict[str, list[Any]] = {}
        self._places: list[tuple[Any, Any]] = []
        self.tensors: dict[str, StoredTensor] = {}
        self.parts: list[tuple[str, ...]] = []
        self._part: list[str] = []

    @property
    def _name(self) -> str:
        return f"__{len(self._files)}_0.distcp"

    def add(self, name: str, shape: tuple[int, ...], dtype: DType, key: _Key) -> None:
        """A tensor: its place in the current file."""
        size = math.prod(key.shape) * dtype.size
        if self._part and self._size + size > self._limit:
            self._close()
        archive = plan_archive(tensor_call(0, key.chunk, dtype), [size])
        start = self._size
        self._literals += [(start + at, data) for at, data in archive.literals]
        self._size += archive.size
        piece = Piece(self._name, start + archive.storages[0], 0, shape[0], 0, math.prod(shape[1:]))
        self.tensors[name] = StoredTensor(name, shape, dtype, (piece,))
        self._part.append(name)
        if key.key not in self._described:
            self._chunks[key.key] = []
            self._described[key.key] = _tensor_metadata(key, dtype, self._chunks[key.key])
        chunk = _object("ChunkStorageMetadata", offsets=_size(key.offsets), sizes=_size(key.chunk))
        self._chunks[key.key].append(written(chunk))
        self._place(key.key, _size(key.offsets), start, archive.size)

    def add_bytes(self, key: str, data: bytes) -> None:
        """An object that is no tensor."""
        self._literals.append((self._size, data))
        self._described[key] = NO_TENSOR
        self._place(key, None, self._size, len(data))
        self._size += len(data)

    def _place(self, key: str, offset: Any, start: int, length: int) -> None:
        index = _object("MetadataIndex", fqn=key, offset=offset, index=None)
        place = {"relative_path": self._name, "offset": start, "length": length}
        stored = Made(Named(f"{TORCH}.filesystem", "_StorageInfo"), place)
        self._places.append((written(index), written(stored)))

    def _close(self) -> None:
        self._files.append(OutputFile(self._name, self._size, joined(self._literals)))
        self.parts.append(tuple(self._part))
        self._literals, self._size, self._part = [], 0, []

    def finished(self) -> tuple[OutputFile, ...]:
        """All files."""
        self._close()
        return tuple(self._files)

    def metadata(self) -> bytes:
        """`.metadata`, as torch's FileSystemReader reads it."""
        return pickled(
            _object(
                "Metadata",
                state_dict_metadata=self._described,
                planner_data=None,
                storage_data=Pairs(self._places),
                storage_meta=None,
            )
        )


def _object(name: str, **state: Any) -> Made:
    """One of the classes that torch describes checkpoints with."""
    return Made(Named(f"{TORCH}.metadata", name), state)


def _size(extents: tuple[int, ...]) -> Call:
    return Call(Named("torch", "Size"), (extents,))


def _tensor_metadata(key: _Key, dtype: DType, chunks: list[Any]) -> Made:
    properties = Made(
        Named(f"{TORCH}.metadata", "TensorProperties"),
        (
            Named("torch", dtype.torch),
            Call(Named("torch.serialization", "_get_layout"), ("torch.strided",)),
            False,
            Call(Named(f"{TORCH}.metadata", "_MEM_FORMAT_ENCODING"), (0,)),
            False,
        ),
    )
    return _object("TensorStorageMetadata", properties=properties, size=_size(key.whole), chunks=chunks)
