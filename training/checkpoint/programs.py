"""Nothing in a checkpoint is run.

A pickle is a program: it names functions that are called while it is read. Core and torch read three kinds: `.metadata`
(by pickle itself), entries of bytes (`_extra_state`; by torch.load without its guard) and common.pt (by torch.load with
its guard). The first two are looked through before core sees them; the third is tried by torch's guard, so that its
refusal is one message. What an FP8 layer keeps is a pickle inside such bytes, which `model.kernels.amax_state` reads.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem, metadata, planner

from foundation.errors import WorkError
from model.kernels.amax_state import is_extra_state, read_state
from training.checkpoint.agreement import from_everyone

Entry = tuple[int, int, bool]
"""Offset, length, and whether it is what an FP8 layer keeps."""

METADATA, COMMON = ".metadata", "common.pt"
CURE = "take the checkpoint from a source that you trust; nothing of it was run"

DATA_ONLY: dict[tuple[str, str], Any] = {
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in {
            metadata: (
                *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
                *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            ),
            planner: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
            filesystem: ("_StorageInfo", "_StoragePrefix"),
        }.items()
        for name in names
        if hasattr(module, name)
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): getattr(torch.serialization, "_get_layout", None),
    ("pathlib", "PosixPath"): str,
    ("collections", "OrderedDict"): dict,
}
"""What `.metadata` may name: dataclasses and enumerations, which do nothing when they are made."""

PARTS: dict[str, tuple[type, ...]] = {
    "state_dict_metadata": (str, metadata.TensorStorageMetadata, metadata.BytesStorageMetadata),
    "storage_data": (metadata.MetadataIndex, filesystem._StorageInfo),
}
"""What keys and values of the two dictionaries of `.metadata` are."""


class _DataOnly(pickle.Unpickler):
    """Reads `.metadata` as pickle does, and ends at the first name that is not data.

    A pickle may also set attributes of a class that it names, so that two keys count as one and what was looked
    through is not what core reads then: the classes are held to be the same afterwards.
    """

    def load(self) -> Any:
        before = {named: dict(vars(named)) for named in DATA_ONLY.values() if hasattr(named, "__dict__")}
        try:
            loaded = super().load()
        finally:
            changed = [name for named, attributes in before.items() for name in _put_back(named, attributes)]
        if changed:
            raise pickle.UnpicklingError(f"it changes {', '.join(changed)}")
        return loaded

    def find_class(self, module: str, name: str) -> Any:
        found = DATA_ONLY.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found


def _put_back(named: Any, before: dict[str, Any]) -> list[str]:
    """Give `named` the attributes that it had `before`; the names of those that were others."""
    now = dict(vars(named))
    changed = [key for key in before.keys() | now.keys() if key not in now or before.get(key, now) is not now[key]]
    for key in changed:
        if key in before:
            setattr(named, key, before[key])
        else:
            delattr(named, key)
    return [f"{named.__qualname__}.{key}" for key in changed]


def look_through(checkpoint: Path) -> None:
    """`refuse_programs`, each rank a share of the files; what one of them refuses ends all. Collective.

    Core would wait for a rank that ended here alone.

    Raises:
        WorkError: as `refuse_programs`, of any rank.
    """
    from_everyone(lambda: refuse_programs(checkpoint, dist.get_rank(), dist.get_world_size()))


def refuse_programs(checkpoint: Path, rank: int = 0, ranks: int = 1) -> None:
    """Look through everything of `checkpoint` that core would unpickle.

    Args:
        rank, ranks: every `ranks`-th of the files with entries of bytes is looked at here.

    Raises:
        WorkError: a part names what is not data, or is damaged.
    """
    described = _read(checkpoint / METADATA, _described)
    _read(checkpoint / COMMON, _loaded)
    entries: dict[str, list[Entry]] = {}
    for index, info in described.storage_data.items():
        name = info.relative_path
        if not isinstance(name, str) or "/" in name or name.startswith("."):
            raise WorkError(f"{checkpoint}: {index.fqn} lies in {name!r}, which is no file of this folder", cure=CURE)
        if info.transform_descriptors:  # core would undo them first, and so read other bytes than are looked at here
            raise WorkError(f"{checkpoint}: {index.fqn} is stored transformed", cure=CURE)
        if isinstance(described.state_dict_metadata.get(index.fqn), metadata.BytesStorageMetadata):
            entries.setdefault(name, []).append((info.offset, info.length, is_extra_state(index.fqn)))
    for name in sorted(entries)[rank::ranks]:
        _look_through_file(checkpoint / name, entries[name])


def _look_through_file(path: Path, entries: list[Entry]) -> None:
    """What lies in a file; a model of many experts has tens of thousands of entries, most of them alike."""
    seen: set[tuple[bytes, bool]] = set()
    with _refused(path), path.open("rb") as handle:
        for offset, length, is_state in entries:
            handle.seek(offset)
            data = handle.read(length)
            alike = hashlib.sha256(data).digest(), is_state
            if alike in seen:
                continue
            seen.add(alike)
            held = _loaded(data)
            if is_state:
                _look_through_state(held)


def _loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _described(data: bytes) -> Any:
    described = _DataOnly(io.BytesIO(data)).load()
    for name, kinds in PARTS.items():
        part = getattr(described, name, None)
        if not isinstance(part, dict) or not all(isinstance(one, kinds) for pair in part.items() for one in pair):
            raise pickle.UnpicklingError(f"its {name} does not say what lies where")
    return described


def _look_through_state(held: Any) -> None:
    """The bytes of an FP8 layer are a pickle once more; core puts what a rank writes under a name in a list."""
    for state in held if isinstance(held, list) else [held]:
        read_state(state)


def _read(path: Path, read: Callable[[bytes], Any]) -> Any:
    with _refused(path):
        return read(path.read_bytes())


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Inside the block every failure to read `path` is a refusal of it."""
    try:
        yield
    except OSError as error:
        raise WorkError(f"{path} can't be read: {error}", cure="use another checkpoint of the run") from error
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkError(f"{path} holds more than data, or is damaged: {said}", cure=CURE) from error
