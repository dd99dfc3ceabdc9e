"""The wheel that is carried to a GPU machine, on a library made up of two architectures; and the script's words."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest

from scripts.trim_engine import LIBRARY, MAGIC, entries, trim_wheel, trimmed

ROOT = Path(__file__).parents[1]


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(payload)) + bytes(12) + struct.pack("<I", architecture)
    return header.ljust(64, b"\0") + payload


def library() -> bytes:
    """A 64-bit ELF of two sections: names, and code of sm_80, sm_90 and PTX in two containers with a gap."""
    first = entry(2, 80, b"a" * 40) + entry(2, 90, b"b" * 24)
    second = entry(1, 90, b"c" * 16) + entry(2, 90, b"d" * 8)
    code = b"".join(struct.pack("<IHHQ", MAGIC, 1, 16, len(part)) + part + bytes(8) for part in (first, second))
    names = b"\0.nv_fatbin\0.shstrtab\0"
    headers = bytes(64) + struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, 64, len(code), 0, 0, 8, 0)
    headers += struct.pack("<IIQQQQIIQQ", 12, 3, 0, 0, 64 + len(code), len(names), 0, 0, 1, 0)
    start = bytearray(64)
    start[:4] = b"\x7fELF"
    struct.pack_into("<Q", start, 0x28, 64 + len(code) + len(names))
    struct.pack_into("<HHH", start, 0x3A, 64, 3, 2)
    return bytes(start) + code + names + headers


def test_only_one_architectures_machine_code_stays() -> None:
    whole = library()
    sizes = [(kind, of, size) for kind, of, _, size in entries(whole)]
    assert sizes == [(2, 80, 40), (2, 90, 24), (1, 90, 16), (2, 90, 8)]
    small = trimmed(whole, 90)
    assert len(small) == len(whole)
    held = [small[offset : offset + size] for _, _, offset, size in entries(small)]
    assert held == [bytes(40), b"b" * 24, bytes(16), b"d" * 8]
    with pytest.raises(ValueError, match="sm_100"):
        trimmed(whole, 100)
    with pytest.raises(ValueError, match=r"no section"):
        trimmed(whole.replace(b".nv_fatbin", b".nv_fatbun"), 90)


def test_a_wheel_stays_one(tmp_path: Path) -> None:
    given = tmp_path / "engine-1-py3-none-any.whl"
    with zipfile.ZipFile(given, "w") as wheel:
        for name, data in (
            (f"engine/{LIBRARY}", library()), ("engine/jax/big.so", b"x"), ("engine/a.py", b"pass\n"),
            ("engine-1.dist-info/RECORD", b""),
        ):  # fmt: skip
            wheel.writestr(name, data)
    (tmp_path / "out").mkdir()
    with zipfile.ZipFile(trim_wheel(given, tmp_path / "out", 90)) as made:
        assert set(made.namelist()) == {f"engine/{LIBRARY}", "engine/a.py", "engine-1.dist-info/RECORD"}
        lines = made.read("engine-1.dist-info/RECORD").decode().splitlines()
        assert f"engine/a.py,sha256={_digest(b'pass' + bytes([10]))},5" in lines and len(lines) == 3


def _digest(data: bytes) -> str:
    import base64

    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def test_the_script_says_what_it_takes() -> None:
    script = ROOT / "scripts/gpu_machine.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "fetch or install" in done.stderr
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=300)
    assert ".gpu/" in (ROOT / ".gitignore").read_text().splitlines()  # binaries are never committed
