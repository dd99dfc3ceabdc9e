"""Folders of transformers: safetensors, one file or sharded, with config.json."""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.architectures.table import Entry, row_runs, source_shapes
from checkpoint_tools.catalog import Catalog, Piece, StoredTensor
from checkpoint_tools.dtypes import BY_SAFETENSORS, DType, dtype_named
from checkpoint_tools.endings import stop_tokens
from checkpoint_tools.formats.unexpected import check_names, refuse_shape
from checkpoint_tools.manifest import MANIFEST, TOKENIZER, read_manifest
from checkpoint_tools.record import RECORD, read_record
from checkpoint_tools.target import OutputFile, Target, in_parts
from data.chat import own_templates
from data.tokenizer import load_tokenizer
from foundation.errors import RequestError, WorkError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
HEADER_LIMIT = 100_000_000
"""safetensors' own."""
COPIED = ("generation_config.json", "LICENSE", "USE_POLICY.md")


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a safetensors file; `offset` counts from the file's beginning."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: DType

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def read_hugging_face(folder: Path) -> Catalog:
    """The catalog of a folder of transformers.

    Raises:
        RequestError: a family or tensors that are not converted.
        WorkError: a file is missing or damaged.
    """
    config = read_json(folder / CONFIG)
    identity = Identity.from_hugging_face(config, str(folder / CONFIG))
    found = _all_tensors(folder)
    entries = identity.entries()
    notes = list(_check(identity, entries, found, folder))
    tensors = {entry.name: _stored(entry, identity, found, folder) for entry in entries}
    if identity.dimensions.tied and "lm_head.weight" in found:
        embedding = tensors["embedding.word_embeddings.weight"]
        copy = found["lm_head.weight"]
        refuse_shape("lm_head.weight", copy.shape, embedding.shape, folder)
        piece = Piece(copy.file, copy.offset, 0, embedding.rows, 0, embedding.columns)
        tensors[embedding.name] = StoredTensor(
            embedding.name, embedding.shape, embedding.dtype, embedding.pieces, (piece,)
        )
        notes.append("lm_head.weight is there although the embedding is tied: it is held to be the same, and left out")
    record = read_record(folder)
    return Catalog(
        "hf",
        folder,
        identity,
        tensors,
        step=record.step if record else 0,
        tokens=record.tokens if record else 0,
        notes=tuple(notes),
        recorded=record.hashes() if record else {},
    )


def _check(identity: Identity, entries: Sequence[Entry], found: Mapping[str, FileTensor], folder: Path) -> list[str]:
    """Refuse what is missing or unknown; what holds no weights is noted."""
    wanted = {source for entry in entries for source in entry.sources}
    tied = {"lm_head.weight"} if identity.dimensions.tied else set()
    dropped = check_names(wanted, set(found) - tied, identity.architecture, folder)
    return [f"{len(dropped)} tensors that hold no weights are left out: {dropped[0]} ..."] if dropped else []


def _stored(entry: Entry, identity: Identity, found: Mapping[str, FileTensor], folder: Path) -> StoredTensor:
    sources = [found[name] for name in entry.sources]
    shapes = source_shapes(entry, identity.dimensions)
    for name, source, shape in zip(entry.sources, sources, shapes, strict=True):
        refuse_shape(name, source.shape, shape, folder)
        if source.dtype is not sources[0].dtype:
            raise RequestError(
                f"{name} is {source.dtype.name} and {entry.sources[0]} is {sources[0].dtype.name}",
                where=str(folder),
                rule="tensors that become one have one dtype",
                cure="save the model in one dtype with transformers",
            )
    row_bytes = math.prod(entry.shape[1:]) * sources[0].dtype.size
    pieces = tuple(
        Piece(
            sources[run.source].file,
            sources[run.source].offset + run.source_row * row_bytes,
            run.row,
            run.rows,
            0,
            math.prod(entry.shape[1:]),
        )
        for run in row_runs(entry.row.join, entry.shape[0], identity.dimensions)
    )
    return StoredTensor(entry.name, entry.shape, sources[0].dtype, pieces)


def _all_tensors(folder: Path) -> dict[str, FileTensor]:
    tensors: dict[str, FileTensor] = {}
    for name in _files(folder):
        for key, tensor in read_header(folder, name).items():
            if key in tensors:
                raise WorkError(f"tensor {key} is in {tensors[key].file} and in {name}", where=str(folder))
            tensors[key] = tensor
    return tensors


def _files(folder: Path) -> list[str]:
    """The safetensors files that make up the model."""
    if (folder / SINGLE).is_file():  # where both are there, transformers takes this one
        return [SINGLE]
    index = folder / INDEX
    if index.is_file():
        mapped = read_json(index).get("weight_map")
        if not isinstance(mapped, dict) or not all(isinstance(file, str) for file in mapped.values()):
            raise WorkError(f"{index} is damaged: it has no weight_map", cure="use another copy of the model")
        names = sorted(set(mapped.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise WorkError(
                f"{len(missing)} of {len(names)} files of the model are missing: {', '.join(missing[:5])}",
                where=str(folder),
                cure="fetch them, or use another copy of the model",
            )
        if any("/" in name for name in names):
            raise WorkError(f"{index} names files outside of its folder", cure="use another copy of the model")
        return names
    if (folder / RECORD).is_file():
        raise WorkError(f"{folder / SINGLE} is missing", cure="use another copy of the model")
    raise RequestError(
        f"{folder} has neither {SINGLE} nor {INDEX}",
        rule="weights are read from safetensors, not from pickles",
        cure="save the model with transformers: model.save_pretrained(folder)",
    )


def read_header(folder: Path, name: str) -> dict[str, FileTensor]:
    """The tensors of one safetensors file.

    Raises:
        WorkError: the file is cut off or its header is damaged.
    """
    path = folder / name
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_LIMIT + 1
        if length > HEADER_LIMIT or 8 + length > size:
            raise WorkError(f"{path} is damaged: it has no header", cure="use another copy of the file")
        raw = handle.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {key: _file_tensor(name, key, entry, 8 + length, size, path) for key, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WorkError(f"{path} is damaged: its header says {error}", cure="use another copy of the file") from error
    ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes))
    for (key, tensor), (following, other) in itertools.pairwise(ordered):
        if tensor.offset + tensor.bytes > other.offset:
            raise WorkError(
                f"{path} is damaged: tensors {key} and {following} overlap", cure="use another copy of the file"
            )
    return tensors


def _file_tensor(name: str, key: str, entry: Any, base: int, size: int, path: Path) -> FileTensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(number) is not int or number < 0 for number in (start, end, *shape)):
        raise ValueError(f"tensor {key} has shape {list(shape)} at {[start, end]}")
    dtype = dtype_named(BY_SAFETENSORS, entry["dtype"], key, str(path))
    if base + end > size:
        raise WorkError(
            f"{path} is cut off: tensor {key} ends at byte {base + end}, the file at {size}",
            cure="fetch the file again, or use another copy",
        )
    if end - start != math.prod(shape) * dtype.size:
        raise WorkError(f"{path} is damaged: tensor {key} has {end - start} bytes for {list(shape)}")
    return FileTensor(name, base + start, shape, dtype)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise RequestError(f"{path} is not there", rule="a folder of transformers has it", cure="add it") from error
    except (ValueError, OSError, RecursionError) as error:
        raise WorkError(f"{path} is damaged: {error}", cure="use another copy of the file") from error
    if not isinstance(found, dict):
        raise WorkError(f"{path} is damaged: it holds no JSON object", cure="use another copy of the file")
    return found


def plan_hugging_face(source: Catalog, dtypes: Mapping[str, DType]) -> Target:
    """Lay out a folder of transformers for the weights of `source`.

    Args:
        dtypes: of each tensor in the target.
    """
    identity: Identity = source.identity
    shards = _shards(identity, dtypes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    )
    files: list[OutputFile] = []
    tensors: dict[str, StoredTensor] = {}
    weight_map: dict[str, str] = {}
    for name, entries in zip(names, shards, strict=True):
        header, starts, size = _header(entries, identity, dtypes)
        files.append(OutputFile(name, size, ((0, header),)))
        weight_map |= dict.fromkeys(starts, name)
        for entry in entries:
            tensors[entry.name] = _planned(entry, identity, dtypes[entry.name], starts, name)
    kinds = [dtype.torch for dtype in dtypes.values()]
    common = max(dict.fromkeys(kinds), key=kinds.count)
    texts = {CONFIG: as_json(identity.config(common) | _ends(source))}
    if len(shards) > 1:
        total = sum(tensor.bytes for tensor in tensors.values())
        texts[INDEX] = as_json({"metadata": {"total_size": total}, "weight_map": weight_map})
    notes = ("transformers' files have no optimizer state: it is left aside",) if source.optimizer_state else ()
    return Target("hf", tuple(files), tensors, in_parts(tensors.values()), texts, notes=notes)


def _ends(source: Catalog) -> dict[str, Any]:
    """Where generation is to stop. transformers takes it from config.json, not from the tokenizer, and goes on behind
    the end without it. A config.json that came with the model says it already."""
    identity: Identity = source.identity
    if identity.hugging_face is not None or source.format != "distributed" or not (source.folder / MANIFEST).is_file():
        return {}
    manifest, words = read_manifest(source.folder), source.folder / TOKENIZER
    talks = manifest.chat_template or own_templates(words)
    ends = sorted(stop_tokens(manifest, load_tokenizer(words) if talks else None))
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _shards(identity: Identity, dtypes: Mapping[str, DType]) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in identity.entries():
        bytes_ = math.prod(entry.shape) * dtypes[entry.name].size
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += bytes_
    return shards


def _header(
    entries: Sequence[Entry], identity: Identity, dtypes: Mapping[str, DType]
) -> tuple[bytes, dict[str, int], int]:
    """(header, where each tensor starts in the file, size of the file)."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    starts: dict[str, int] = {}
    for entry in entries:
        dtype = dtypes[entry.name]
        for name, shape in zip(entry.sources, source_shapes(entry, identity.dimensions), strict=True):
            size = math.prod(shape) * dtype.size
            described[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [at, at + size]}
            starts[name] = at
            at += size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + at


def _planned(entry: Entry, identity: Identity, dtype: DType, starts: Mapping[str, int], file: str) -> StoredTensor:
    columns = math.prod(entry.shape[1:])
    pieces = tuple(
        Piece(
            file,
            starts[entry.sources[run.source]] + run.source_row * columns * dtype.size,
            run.row,
            run.rows,
            0,
            columns,
        )
        for run in row_runs(entry.row.join, entry.shape[0], identity.dimensions)
    )
    return StoredTensor(entry.name, entry.shape, dtype, pieces)


def as_json(value: Any) -> bytes:
    """As transformers writes its small files."""
    return (json.dumps(value, indent=2) + os.linesep).encode()
