"""Make Transformer Engine's core wheel small enough to be carried: keep one architecture's machine code.

    python -m scripts.trim_engine IN.whl OUT_FOLDER 90

Of 171 MiB 17 stay for sm_90. The section .nv_fatbin of libtransformer_engine.so holds code for every architecture, each
entry with a header that names it; the driver takes the entries of its own. The payload of all others becomes zeros,
which a wheel packs away; sizes and offsets stay, so nothing has to be linked again.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

LIBRARY = "libtransformer_engine.so"
MAGIC = 0xBA55ED50
MACHINE_CODE = 2
"""Kind of an entry; 1 is PTX."""


def section(library: bytes | bytearray, wanted: str) -> tuple[int, int]:
    """(offset, size) of a section of a 64-bit ELF file.

    Raises:
        ValueError: it has none of that name.
    """
    (table,) = struct.unpack_from("<Q", library, 0x28)
    size, count, names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", library, table + number * size) for number in range(count)]
    first_name = headers[names][4]
    for header in headers:
        start = first_name + header[0]
        if library[start : library.find(b"\0", start)] == wanted.encode():
            return header[4], header[5]
    raise ValueError(f"no section {wanted}")


def entries(library: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """(kind, architecture, offset, size) of the payload of every entry of .nv_fatbin."""
    place, size = section(library, ".nv_fatbin")
    end = place + size
    while place < end - 16:
        magic, _, header, length = struct.unpack_from("<IHHQ", library, place)
        if magic != MAGIC:  # containers are padded to 8 bytes
            place += 8
            continue
        place += header
        until = place + length
        while place < until:
            kind, _, header, length = struct.unpack_from("<HHIQ", library, place)
            (architecture,) = struct.unpack_from("<I", library, place + 28)
            yield kind, architecture, place + header, length
            place += header + length


def trimmed(library: bytes, architecture: int) -> bytes:
    """`library` with the machine code of `architecture` alone, of the same size.

    Raises:
        ValueError: it has none of that architecture.
    """
    found, kept = bytearray(library), 0
    for kind, of, offset, size in entries(library):
        if kind == MACHINE_CODE and of == architecture:
            kept += size
        else:
            found[offset : offset + size] = bytes(size)
    if not kept:
        raise ValueError(f"no machine code for sm_{architecture}")
    return bytes(found)


def trim_wheel(given: Path, folder: Path, architecture: int) -> Path:
    """The wheel `given` with a trimmed library and without its parts for JAX, under its own name in `folder`."""
    made, records = folder / given.name, []
    with zipfile.ZipFile(given) as source, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
        record = next(name for name in source.namelist() if name.endswith(".dist-info/RECORD"))
        for info in source.infolist():
            if "/jax/" in info.filename or info.filename == record:
                continue
            data = source.read(info)
            if info.filename.endswith(LIBRARY):
                data = trimmed(data, architecture)
            target.writestr(info.filename, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            records.append(f"{info.filename},sha256={digest},{len(data)}\n")
        target.writestr(record, "".join([*records, f"{record},,\n"]))
    return made


def main() -> None:
    """Trim what the arguments name."""
    made = trim_wheel(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    print(f"{made}: {made.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
