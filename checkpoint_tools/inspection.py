"""What is inside a checkpoint, without reading its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.catalog import Catalog, StoredTensor
from checkpoint_tools.manifest import MANIFEST, read_manifest

MODULES = (
    ("embedding", re.compile(r"embedding\..*")),
    ("attention", re.compile(r"decoder\.layers\.\d+\.self_attention\..*")),
    ("router", re.compile(r"decoder\.layers\.\d+\.mlp\.router\..*")),
    ("experts", re.compile(r"decoder\.layers\.\d+\.mlp\.experts\..*")),
    ("feed-forward", re.compile(r"decoder\.layers\.\d+\.mlp\..*")),
    ("norms", re.compile(r"decoder\..*layernorm.*")),
    ("output layer", re.compile(r"output_layer\..*")),
)
"""Parts of a model; the first that a name matches has it."""


def describe(catalog: Catalog) -> dict[str, Any]:
    """The facts, as JSON would have them."""
    identity: Identity = catalog.identity
    weights, state = catalog.weights, catalog.optimizer_state
    facts: dict[str, Any] = {
        "folder": str(catalog.folder),
        "format": catalog.format,
        "architecture": identity.architecture.name,
        "written_at": catalog.layout,
        "step": catalog.step,
        "tokens": catalog.tokens,
        "parameters": sum(tensor.rows * tensor.columns for tensor in weights.values()),
        "vocab_size": identity.dimensions.vocab,
        "tensors": len(weights),
        "bytes": sum(tensor.bytes for tensor in weights.values()),
        "dtypes": _by(weights, lambda tensor: tensor.dtype.name),
        "modules": _by(weights, lambda tensor: module_of(tensor.name)),
        "optimizer_bytes": sum(tensor.bytes for tensor in state.values()),
        "files": len({piece.file for tensor in catalog.tensors.values() for piece in tensor.pieces}),
        "hashes": hashes_of(catalog),
        "notes": list(catalog.notes),
    }
    if identity.model is not None:
        facts["model"] = identity.model.model_dump(exclude_defaults=True)
    return facts


def hashes_of(catalog: Catalog) -> str:
    """What the checkpoint can be held to: "tensors", "files" or "none"."""
    if catalog.recorded:
        return "tensors"
    if (catalog.folder / MANIFEST).is_file() and read_manifest(catalog.folder).files:
        return "files"
    return "none"


def module_of(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    return next((module for module, pattern in MODULES if pattern.fullmatch(name)), "other")


def _by(tensors: Mapping[str, StoredTensor], group: Any) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[group(tensor)] = sizes.get(group(tensor), 0) + tensor.bytes
    return sizes
