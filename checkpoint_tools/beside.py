"""What lies beside the tensors of a converted checkpoint: tokenizer, record, manifest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.catalog import Catalog
from checkpoint_tools.copying import DonePart
from checkpoint_tools.dtypes import FP32
from checkpoint_tools.formats.distributed_target import padded_rows
from checkpoint_tools.formats.hugging_face import COPIED
from checkpoint_tools.journal import JOURNAL, LOCK
from checkpoint_tools.manifest import MANIFEST, TOKENIZER, FileRecord, Manifest, read_manifest, record_file
from checkpoint_tools.record import RECORD, ConversionRecord, TensorRecord
from checkpoint_tools.target import Target
from data.tokenizer import FILE_NAMES, TEMPLATE_FILE, load_tokenizer
from foundation.files import whole_file, write_text

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
)


def check_tokenizer(source: Catalog, target: Target) -> None:
    """Load the tokenizer that the target's manifest will describe, before anything is written.

    Raises:
        ConfigError: it cannot be loaded.
    """
    identity: Identity = source.identity
    if target.format != "distributed" or identity.model is None or _has_manifest(source):
        return
    files = [place / name for name in FILE_NAMES for place in (source.folder / TOKENIZER, source.folder)]
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        load_tokenizer(file)


def write_beside(source: Catalog, target: Target, folder: Path, done: Mapping[int, DonePart], plan: str) -> None:
    """Everything beside the tensors; the manifest last, with the hashes of the rest.

    Args:
        plan: the fingerprint that the record keeps.
    """
    for name, data in target.texts.items():
        with whole_file(folder / name) as file:
            file.write(data)
    beside = folder / target.beside
    _copy_side_files(source, beside, hugging_face=target.format == "hf")
    write_text(beside / RECORD, _record(source, target, done, plan).model_dump_json(indent=1) + "\n")
    identity: Identity = source.identity
    if target.format == "distributed" and identity.model is not None:
        manifest = _manifest(source, target, folder, done, identity)
        write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def _copy_side_files(source: Catalog, folder: Path, *, hugging_face: bool) -> None:
    """The tokenizer, and what transformers keeps beside a model."""
    to = folder if hugging_face else folder / TOKENIZER
    for place in (source.folder, source.folder / TOKENIZER):
        names = [*TOKENIZER_FILES, *(COPIED if hugging_face else ())]
        for name in names:
            if (place / name).is_file():
                with (place / name).open("rb") as source_file, whole_file(to / name) as file:
                    shutil.copyfileobj(source_file, file)
    if hugging_face and _has_manifest(source) and (template := read_manifest(source.folder).chat_template):
        write_text(folder / TEMPLATE_FILE, template)  # what the model has learned to read, whatever it came with


def _has_manifest(source: Catalog) -> bool:
    return source.format == "distributed" and (source.folder / MANIFEST).is_file()


def _record(source: Catalog, target: Target, done: Mapping[int, DonePart], plan: str) -> ConversionRecord:
    identity: Identity = source.identity
    hashes = {name: digest for part in done.values() for name, digest in part.hashes.items()}
    return ConversionRecord(
        format=target.format,
        layout=target.layout,
        source_format=source.format,
        source=source.folder.resolve().name,
        plan=plan,
        architecture=identity.architecture.name,
        hugging_face=None if identity.hugging_face is None else dict(identity.hugging_face),
        model=identity.model,
        vocab_size=identity.dimensions.vocab,
        step=source.step,
        tokens=source.tokens,
        orthant=version("orthant"),
        tensors={
            name: TensorRecord(shape=tensor.shape, dtype=tensor.dtype.name, xxh3_128=hashes[name])
            for name, tensor in target.tensors.items()
        },
    )


def _manifest(
    source: Catalog, target: Target, folder: Path, done: Mapping[int, DonePart], identity: Identity
) -> Manifest:
    """What training and generation read of a checkpoint."""
    if identity.model is None:
        raise AssertionError("only models that the decoder runs have a manifest")
    files = {target.tensors[target.parts[number][0]].pieces[0].file: part.file_hash for number, part in done.items()}
    records: dict[str, FileRecord] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if files.get(name) is not None:
            records[name] = FileRecord(bytes=path.stat().st_size, xxh3_128=files[name])
        elif name not in (MANIFEST, JOURNAL, LOCK):
            records[name] = record_file(path, "xxh3_128")
    facts: dict[str, Any] = {
        "step": source.step,
        "tokens": source.tokens,
        "model": identity.model,
        "precision": _precision(target),
        "vocab_size": identity.dimensions.vocab,
        "padded_vocab_size": padded_rows(identity),
        "saved_at": {"converted_from": source.format, "orthant": version("orthant")},
        "files": records,
    }
    if _has_manifest(source):
        before = read_manifest(source.folder)
        kept = (
            "model",
            "tokenizer_path",
            "tokenizer_hash",
            "eod_id",
            "chat_template",
            "data_fingerprint",
            "guards",
            "ppo",
        )
        facts |= {name: getattr(before, name) for name in kept}
        if all(source.tensors[name].dtype is tensor.dtype for name, tensor in target.tensors.items()):
            facts["precision"] = before.precision
    elif any((folder / TOKENIZER / name).is_file() for name in FILE_NAMES):
        tokenizer = load_tokenizer(folder / TOKENIZER)
        facts |= {"tokenizer_path": str(source.folder.resolve()), "tokenizer_hash": tokenizer.hash}
        facts["eod_id"] = tokenizer.eod_id
    return Manifest.model_validate(facts)


def _precision(target: Target) -> str:
    """fp32 where every tensor is; else the type of most others, as some of a bf16 model's may be fp32."""
    narrow = [tensor.dtype.name for tensor in target.tensors.values() if tensor.dtype is not FP32]
    return max(dict.fromkeys(narrow), key=narrow.count) if narrow else FP32.name
