"""Makes an environment's null libraries and puts them in the place of NVIDIA's: `scripts/null_gpu.sh build FOLDER`.

Each library has sources beside this file. It gets every name that NVIDIA's own exports: what the sources do not write
is a function that returns 0, which means success in all of these libraries. NVIDIA's are kept beside as *.real, and a
link stands in their place, so that every process has each library once, by whatever path it asks for it.
engine/ has what computes in Transformer Engine's place, and torch_on_host.cpp what does in torch's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = ("cu13/include", "cudnn/include", "nccl/include")
RUNTIME = "libcudart.so.13"
TORCH = "libtorch_on_host.so"
TORCH_SOURCES = ("torch_on_host.cpp", "torch_fused.cpp")
ENGINE = "libtransformer_engine_on_host.so"
# For the processor that it is built on, where it runs too.
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-std=c++17")

EMPTY_HEAD = """#include <stdio.h>
#include <stdlib.h>
static int called(const char *name) {
    if (getenv("ORTHANT_NULL_GPU_TRACE")) fprintf(stderr, "null GPU: %s is empty\\n", name);
    return 0;
}
"""

SMI = """#!/bin/sh
# Answers the questions that Orthant asks of nvidia-smi, for cards that are not there (scripts/null_gpu).
case "$*" in
    *=compute_cap\\ *) line=9.0 ;;
    *=name,memory.total,driver_version\\ *) line='NVIDIA H200, 143771 MiB, 580.00' ;;
    *) echo "null GPU: nvidia-smi does not know: $*" >&2; exit 1 ;;
esac
for _ in $(seq "${ORTHANT_NULL_GPU_DEVICES:-1}"); do echo "$line"; done
"""


@dataclass(frozen=True)
class Library:
    """A library that is replaced.

    Attributes:
        name: its file and soname.
        sources: in this folder.
        where: the folder below site-packages/nvidia; None for the driver, which no wheel brings.
        versioned: whether its symbols carry the soname as their version, as NVIDIA's do.
    """

    name: str
    sources: tuple[str, ...]
    where: str | None
    versioned: bool = True


LIBRARIES = (
    Library(RUNTIME, ("libcudart.cpp", "libcudart_work.cpp", "libcudart_kernels.cpp"), "cu13/lib"),
    Library("libcuda.so.1", ("libcuda.cpp",), None, versioned=False),
    Library("libcublasLt.so.13", ("libcublas.cpp", "libcublas_products.cpp"), "cu13/lib"),
    Library("libcublas.so.13", ("libcublas.cpp", "libcublas_products.cpp"), "cu13/lib"),
    Library("libcudnn.so.9", ("libcudnn.cpp",), "cudnn/lib"),
    Library("libnccl.so.2", ("libnccl.cpp",), "nccl/lib", versioned=False),
    Library("libcupti.so.13", ("libcupti.cpp",), "cu13/lib"),
)


def driver_names(header: str) -> set[str]:
    """Functions that cuda.h declares, by every name that it gives them: cuMemAlloc is cuMemAlloc_v2 there."""
    declared = set(re.findall(r"\bCUDAAPI\s+(cu[A-Z]\w*)\s*\(", header))
    renamed = re.findall(
        r"^\s*#\s*define\s+(cu[A-Z]\w*)\s+(?:__CUDA_API_PT[DS][SZ]\()?(cu[A-Z]\w*)", header, re.MULTILINE
    )
    return declared | {name for pair in renamed for name in pair}


def exported_names(listing: str) -> set[str]:
    """Functions in what `nm --defined-only` prints, without their versions; C++'s and the loader's own left out."""
    found = set()
    for line in listing.splitlines():
        kind, name = ["", "", *line.split()][-2:]
        name = name.split("@")[0]
        if kind in ("T", "W") and re.fullmatch(r"[A-Za-z_]\w*", name) and not name.startswith(("_init", "_fini", "_Z")):
            found.add(name)
    return found


def empty_functions(names: set[str]) -> str:
    """C in which each of them returns 0, and says so where ORTHANT_NULL_GPU_TRACE is set."""
    return EMPTY_HEAD + "".join(f'int {name}(void) {{ return called("{name}"); }}\n' for name in sorted(names))


def build(environment: Path) -> None:
    """Make every library in ENVIRONMENT/null and put it in NVIDIA's place in that environment alone."""
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    nvidia, out = packages / "nvidia", environment / "null"
    (out / "made").mkdir(parents=True, exist_ok=True)
    for library in LIBRARIES:
        names = _names(library, nvidia)
        written = _make(library, names, nvidia, out)
        print(f"{library.name}: {len(written)} functions written, {len(names - written)} empty")
        if library.where:
            _replace(nvidia / library.where / library.name, out / library.name)
    for part in sorted((nvidia / "cudnn/lib").glob("libcudnn_*.so.9")):
        _make_part(part.name, out)
        _replace(part, out / part.name)
    build_torch(packages, out)
    build_engine(packages, out)
    shutil.copy(HERE / "in_environment.py", packages / "sitecustomize.py")
    smi = environment / "bin" / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    (environment / "root" / "dev").mkdir(parents=True, exist_ok=True)


def build_torch(packages: Path, out: Path) -> None:
    """Make out/TORCH, which computes torch's operators on the host once it is loaded."""
    torch = packages / "torch"
    headers = (torch / "include", torch / "include/torch/csrc/api/include", packages / "nvidia/cu13/include")
    parts = [str(out / "made" / f"{source}.o") for source in TORCH_SOURCES]
    for source, part in zip(TORCH_SOURCES, parts, strict=True):
        _run("g++", "-std=c++20", "-O1", "-fPIC", "-w", "-c", *(f"-I{one}" for one in headers), str(HERE / source),
             "-o", part)  # fmt: skip
    _link(TORCH, out, [*parts, f"-L{torch / 'lib'}", "-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda"])


def build_engine(packages: Path, out: Path) -> None:
    """Make out/ENGINE, which takes the place of libtransformer_engine's functions where it is loaded before it."""
    includes = [f"-I{packages / folder}" for folder in ("transformer_engine/common/include", "nvidia/cu13/include")]
    (out / "made").mkdir(parents=True, exist_ok=True)
    parts = []
    for source in sorted((HERE / "engine").glob("*.cpp")):
        parts.append(str(out / "made" / f"{ENGINE}.{source.name}.o"))
        _run("g++", *OPTIONS, "-Wall", "-Wextra", "-Werror", "-c", *includes, str(source), "-o", parts[-1])
    # Lazy: what it takes from the real library is there when it is called, not when it is loaded.
    _link(ENGINE, out, [*parts, "-Wl,-z,lazy", "-ldl"])


def _names(library: Library, nvidia: Path) -> set[str]:
    if library.where is None:
        return driver_names((nvidia / "cu13/include/cuda.h").read_text())
    there = nvidia / library.where / library.name
    kept = there.with_name(there.name + ".real")
    return exported_names(_output("nm", "-D", "--defined-only", str(kept if kept.exists() else there)))


def _make(library: Library, names: set[str], nvidia: Path, out: Path) -> set[str]:
    """Compile and link; the functions that the source writes."""
    made = out / "made" / library.name
    empty, version = (made.with_name(made.name + end) for end in (".c", ".map"))
    includes = [f"-I{nvidia / folder}" for folder in HEADERS]
    here, parts = set[str](), [f"{empty}.o"]
    for source in library.sources:
        parts.append(f"{made}.{source}.o")
        # NVIDIA marks functions with attributes that theirs and ours need not share.
        _run("g++", *OPTIONS, "-w", "-c", *includes, str(HERE / source), "-o", parts[-1])
        here |= exported_names(_output("nm", "--defined-only", parts[-1]))
    empty.write_text(empty_functions(names - here))
    _run("gcc", "-fPIC", "-w", "-c", str(empty), "-o", f"{empty}.o")
    options = []
    if library.versioned:
        version.write_text(f"{library.name} {{ global: *; }};\n")
        options = [f"-Wl,--version-script={version}"]
    needed = [f"-L{out}", f"-l:{RUNTIME}"] if library.name != RUNTIME else []
    _link(library.name, out, [*parts, *options, *needed, "-ldl"])
    return here


def _make_part(name: str, out: Path) -> None:
    """A part of cuDNN: nothing of its own, the whole behind it."""
    version = out / "made" / f"{name}.map"
    version.write_text(f"{name} {{ global: *; }};\n")
    _link(name, out, [f"-Wl,--version-script={version}", f"-L{out}", "-Wl,--no-as-needed", "-l:libcudnn.so.9"])


def _link(name: str, out: Path, parts: list[str]) -> None:
    """Processes that run go on with the library that they opened."""
    _run("g++", "-shared", f"-Wl,-soname,{name}", "-o", str(out / f"{name}.new"), *parts)
    os.replace(out / f"{name}.new", out / name)


def _replace(there: Path, null: Path) -> None:
    if there.is_symlink():
        there.unlink()
    elif there.exists():
        there.rename(there.with_name(there.name + ".real"))
    there.symlink_to(null)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "null_gpu.txt").exists():
        sys.exit("python -m scripts.null_gpu.build FOLDER, which scripts/null_gpu.sh install made")
    build(Path(sys.argv[1]).resolve())
