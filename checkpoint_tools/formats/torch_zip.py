"""torch's file format: a zip archive, uncompressed, with `data.pkl` and one record for each storage.

A distributed checkpoint's data files are such archives one after the other, one for each chunk of a tensor; a rank
file of Megatron-LM is one archive. Reading finds where the bytes of a tensor lie, writing says where they go; the
bytes themselves go past this module.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.dtypes import BY_STORAGE, DType, dtype_named
from checkpoint_tools.formats.inert_pickle import Inert, Storage, load_inert
from checkpoint_tools.formats.pickle_writer import Call, Named, Persistent, pickled
from foundation.errors import WorkError

ALIGNMENT = 64
"""Of a storage's first byte in its archive, torch's own."""
ARCHIVE = "archive"
STORED_LIMIT = 0xFFFFFFFF
"""Sizes and offsets from here on need zip's 64-bit fields."""
PICKLE_LIMIT = 1 << 30


@dataclass(frozen=True)
class TensorRecord:
    """A tensor in an archive.

    Attributes:
        offset: of its first byte in the file.
        shape, dtype: of it; always contiguous.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: DType


class _Slice(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._at))
        found = os.pread(self._descriptor, wanted, self._start + self._at)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


class Archive:
    """One archive, open: its pickle and where its storages lie.

    Raises:
        WorkError: it is damaged or compressed, or its pickle names what no checkpoint needs.
    """

    def __init__(self, descriptor: int, path: Path, start: int = 0, length: int | None = None) -> None:
        self.path, self._descriptor, self._start = path, descriptor, start
        length = os.fstat(descriptor).st_size - start if length is None else length
        try:
            with zipfile.ZipFile(_Slice(descriptor, start, length)) as archive:
                records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                if "data.pkl" not in records:
                    raise WorkError(f"{path} is no file of torch's: it has no data.pkl")
                if records["data.pkl"].file_size > PICKLE_LIMIT:
                    raise WorkError(f"{path} is damaged: its pickle has {records['data.pkl'].file_size} bytes")
                self.value = load_inert(archive.read(records["data.pkl"]), path)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
            raise WorkError(
                f"{path} is damaged or no file of torch's: {error}", cure="use another copy of the checkpoint"
            ) from error
        self._records = records

    def record(self, tensor: Inert, name: str) -> TensorRecord:
        """Where a tensor of the pickle lies.

        Args:
            tensor: the stand-in of a rebuilt tensor.
            name: for messages.
        """
        storage, first, shape, stride = as_tensor(tensor, name, self.path)
        dtype = dtype_named(BY_STORAGE, storage.kind, name, str(self.path))
        expected = 1
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            if size > 1 and step != expected:
                raise WorkError(f"{self.path}: tensor {name} is not contiguous (strides {stride} of {shape})")
            expected *= size
        info = self._records.get(f"data/{storage.key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < storage.count * dtype.size:
            raise WorkError(f"{self.path} is damaged: the bytes of tensor {name} are not all there")
        if first < 0 or first + expected > storage.count:
            raise WorkError(f"{self.path} is damaged: tensor {name} reaches beyond its storage")
        header = os.pread(self._descriptor, 30, self._start + info.header_offset)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise WorkError(f"{self.path} is damaged: the bytes of tensor {name} are not where the archive says")
        names = sum(struct.unpack_from("<HH", header, 26))
        data = self._start + info.header_offset + 30 + names
        return TensorRecord(data + first * dtype.size, shape, dtype)


def is_tensor(value: Any) -> bool:
    """Whether a stand-in is a tensor."""
    return isinstance(value, Inert) and value.reference.startswith("torch._utils._rebuild_")


def as_tensor(value: Any, name: str, where: Path) -> tuple[Storage, int, tuple[int, ...], tuple[int, ...]]:
    """(storage, first element, shape, stride) of the stand-in of a tensor."""
    while is_tensor(value) and value.reference.endswith(("_rebuild_parameter", "_rebuild_parameter_with_state")):
        value = value.args[0]
    if is_tensor(value) and value.reference.endswith("_rebuild_tensor_v2"):
        match value.args:
            case (Storage() as storage, int(first), tuple(shape), tuple(stride), *_) if len(shape) == len(stride):
                return storage, first, shape, stride
    raise WorkError(f"{where}: {name} is no tensor that is read here")


def tensor_call(key: int, shape: tuple[int, ...], dtype: DType) -> Call:
    """A contiguous tensor over storage `key`, for a pickle."""
    count, stride = 1, []
    for size in reversed(shape):
        stride.append(count)
        count *= size
    storage = Persistent(("storage", Named("torch", dtype.storage), str(key), "cpu", count))
    no_hooks = Call(Named("collections", "OrderedDict"))
    return Call(
        Named("torch._utils", "_rebuild_tensor_v2"), (storage, 0, shape, tuple(reversed(stride)), False, no_hooks)
    )


@dataclass(frozen=True)
class PlannedArchive:
    """An archive whose storages are still to be written.

    Attributes:
        literals: (offset, bytes) of everything but storages.
        storages: offset of each storage.
        size: of the whole.
    """

    literals: tuple[tuple[int, bytes], ...]
    storages: tuple[int, ...]
    size: int


def plan_archive(value: Any, storages: list[int]) -> PlannedArchive:
    """Lay out an archive, byte by byte.

    CRC-32 of storages are left 0, as torch itself does when told not to compute them: its reader does not look at them.

    Args:
        value: for `data.pkl`, in the terms of `pickle_writer`.
        storages: bytes of storage 0, 1, ...
    """
    position = 0
    literals: list[tuple[int, bytes]] = []
    central: list[bytes] = []
    offsets: list[int] = []

    def add(name: str, size: int, data: bytes | None) -> None:
        nonlocal position
        header, entry = _headers(f"{ARCHIVE}/{name}", size, position, zlib.crc32(data or b""))
        literals.append((position, header + (data or b"")))
        central.append(entry)
        if data is None:
            offsets.append(position + len(header))
        position += len(header) + size

    for name, data in (
        ("data.pkl", pickled(value)),
        (".format_version", b"1"),
        (".storage_alignment", str(ALIGNMENT).encode()),
        ("byteorder", b"little"),
    ):
        add(name, len(data), data)
    for key, size in enumerate(storages):
        add(f"data/{key}", size, None)
    add("version", 2, b"3\n")
    end = b"".join(central)
    trailer = end + _end_of_archive(len(central), len(end), position)
    literals.append((position, trailer))
    return PlannedArchive(joined(literals), tuple(offsets), position + len(trailer))


def joined(literals: list[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """The same bytes in as few literals as possible: neighbours become one."""
    runs: list[tuple[int, list[bytes]]] = []
    end = -1
    for offset, data in literals:
        if offset == end:
            runs[-1][1].append(data)
        else:
            runs.append((offset, [data]))
        end = offset + len(data)
    return tuple((offset, b"".join(parts)) for offset, parts in runs)


def _headers(name: str, size: int, position: int, checksum: int) -> tuple[bytes, bytes]:
    """(local header, central entry) of a record; the local header ends at a multiple of the alignment."""
    raw = name.encode()
    wide = size >= STORED_LIMIT or position >= STORED_LIMIT
    extra = struct.pack("<HHQQ", 1, 16, size, size) if wide else b""
    padding = -(position + 30 + len(raw) + len(extra) + 4) % ALIGNMENT
    local_extra = extra + struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    shown = STORED_LIMIT if wide else size
    version = 45 if wide else 20
    fixed = (version, 0, 0, 0, 0x21, checksum, shown, shown, len(raw))
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *fixed, len(local_extra)) + raw + local_extra
    entry_extra = struct.pack("<HHQQQ", 1, 24, size, size, position) if wide else b""
    entry = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        b"PK\1\2",
        version,
        *fixed,
        len(entry_extra),
        0,
        0,
        0,
        0,
        STORED_LIMIT if wide else position,
    )
    return local, entry + raw + entry_extra


def _end_of_archive(count: int, size: int, position: int) -> bytes:
    wide = b""
    if position + size >= STORED_LIMIT or count >= 0xFFFF:
        wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, position)
        wide += struct.pack("<4sIQI", b"PK\6\7", 0, position + size, 1)
    few, at = min(count, 0xFFFF), min(position, STORED_LIMIT)
    return wide + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, few, few, min(size, STORED_LIMIT), at, 0)
