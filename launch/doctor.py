"""What is here, what is missing and the command that fixes it. Each finding is looked up, not assumed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from launch.machine import gpu_present, package_present

OUR_PACKAGES = ("foundation", "parallel", "data", "model", "checkpoint_tools", "training", "alignment", "launch")
LEAST_SHARED_MEMORY = 64 << 20
"""Bytes of /dev/shm below which ranks on one machine fail to talk (containers give 64 MiB by default)."""

Status = Literal["ok", "note", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Fields: `group` and `name`; `status` (ok; note: fine, worth knowing; missing; broken); `found` in words; `fix`, the
    command or step that mends it; `needed`: whether training here fails without it.
    """

    group: str
    name: str
    status: Status
    found: str
    fix: str | None = None
    needed: bool = False

    @property
    def is_trouble(self) -> bool:
        """Whether something that is needed does not work."""
        return self.needed and self.status in ("missing", "broken")


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown."""
    return [
        *required_packages(),
        torch_runs(),
        megatron_core_runs(),
        *gpus(),
        transformer_engine(),
        apex(),
        *slurm(),
        *our_packages(),
        *machine(),
    ]


def requirements(extra: str | None = None) -> list[Requirement]:
    """What the project asks for, or one of its extras does, with the versions that it was tested with.

    From the installed package's metadata; from pyproject.toml in a source tree that is not installed.
    """
    try:
        stated = importlib.metadata.requires("orthant") or []
    except importlib.metadata.PackageNotFoundError:
        return _requirements_of_source_tree(extra)
    found = [Requirement(line) for line in stated]
    environment = {"extra": extra or ""}
    wanted = [one for one in found if one.marker is None or one.marker.evaluate(environment)]
    return [one for one in wanted if (one.marker is not None and "extra" in str(one.marker)) == (extra is not None)]


def _requirements_of_source_tree(extra: str | None) -> list[Requirement]:
    import tomllib

    file = project_root() / "pyproject.toml"
    project = tomllib.loads(file.read_text())["project"] if file.is_file() else {}
    lines = project.get("optional-dependencies", {}).get(extra, []) if extra else project.get("dependencies", [])
    return [Requirement(line) for line in lines]


def project_root() -> Path:
    """The folder that holds our packages."""
    return Path(__file__).resolve().parents[1]


def required_packages() -> list[Finding]:
    """Every package that the project needs, against its tested versions."""
    found = [check_package(requirement) for requirement in requirements()]
    return found or [Finding("packages", "requirements", "note", "neither metadata nor pyproject.toml names any")]


def check_package(requirement: Requirement) -> Finding:
    """One requirement: there, and of a version that was tested."""
    fix = f"{sys.executable} -m pip install '{requirement.name}{requirement.specifier}'"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", requirement.name, "missing", "not installed", fix, needed=True)
    # A local part (2.13.0+cpu) says how it was built, not which version it is.
    if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
        found = f"{version} is outside {requirement.specifier}, which is what was tested"
        return Finding("packages", requirement.name, "broken", found, fix, needed=True)
    return Finding("packages", requirement.name, "ok", f"{version} ({requirement.specifier})", needed=True)


def import_trouble(module: str) -> str | None:
    """Why `module` cannot be imported; None where it can."""
    try:
        with warnings.catch_warnings():
            # Core warns of absent kernels, which have findings of their own.
            warnings.simplefilter("ignore")
            import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {first_line}"
    return None


def torch_runs() -> Finding:
    """torch imports and, where a GPU is, reaches it."""
    trouble = import_trouble("torch")
    if trouble is not None:
        fix = f"{sys.executable} -m pip install --force-reinstall torch"
        return Finding("runtime", "torch", "broken", trouble, fix, needed=True)
    import torch

    built = "for CPU" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    if gpu_present() and not torch.cuda.is_available():
        why = "it was built for CPU" if torch.version.cuda is None else "it does not reach the driver"
        return Finding(
            "runtime",
            "torch",
            "broken",
            f"{torch.__version__} ({built}); a GPU is here and {why}",
            "install the torch build for your CUDA: https://pytorch.org/get-started/locally",
            needed=True,
        )
    return Finding("runtime", "torch", "ok", f"{torch.__version__} ({built})", needed=True)


def megatron_core_runs() -> Finding:
    """megatron-core imports."""
    trouble = import_trouble("megatron.core")
    if trouble is None:
        core = import_module("megatron.core")
        return Finding("runtime", "megatron-core", "ok", f"{core.__version__} imports", needed=True)
    pinned = next((str(one) for one in requirements() if one.name == "megatron-core"), "megatron-core")
    fix = f"{sys.executable} -m pip install --force-reinstall '{pinned}'"
    return Finding("runtime", "megatron-core", "broken", trouble, fix, needed=True)


def gpus() -> list[Finding]:
    """The NVIDIA GPUs, as the driver names them."""
    if not gpu_present():
        return [Finding("GPU", "NVIDIA GPU", "note", "none: everything runs on the CPU platform")]
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        fix = "install the driver's tools, or give the container the GPUs (--gpus all)"
        return [Finding("GPU", "NVIDIA GPU", "broken", f"the driver is here; nvidia-smi: {error}", fix, needed=True)]
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        why = (answer.stderr or answer.stdout).strip().splitlines() or ["no answer"]
        fix = "reload the driver (nvidia-modprobe), or reboot"
        return [Finding("GPU", "NVIDIA GPU", "broken", f"nvidia-smi: {why[0]}", fix, needed=True)]
    return [Finding("GPU", f"GPU {index}", "ok", line) for index, line in enumerate(lines)]


def transformer_engine() -> Finding:
    """Transformer Engine: fused and FP8 kernels on GPUs; optional."""
    pins = requirements("gpu") or [Requirement("transformer-engine[pytorch]")]
    fix = f"{sys.executable} -m pip install --no-build-isolation '{pins[0]}'"
    if not package_present("transformer_engine"):
        without = "the torch kernels run in its place"
        if gpu_present():
            return Finding("kernels", "Transformer Engine", "missing", f"not installed: no FP8, {without}", fix)
        return Finding(
            "kernels", "Transformer Engine", "note", f"not installed, and without a GPU of no use; {without}"
        )
    trouble = import_trouble("transformer_engine.pytorch")
    if trouble is not None:
        return Finding("kernels", "Transformer Engine", "broken", trouble, fix, needed=gpu_present())
    version = _version("transformer-engine") or "unknown version"
    return Finding("kernels", "Transformer Engine", "ok", version)


def apex() -> Finding:
    """NVIDIA apex, told from the unrelated PyPI package of that name by what it holds; optional."""
    build = (
        f"{sys.executable} -m pip install --no-build-isolation --config-settings=--build-option=--cpp_ext "
        "--config-settings=--build-option=--cuda_ext git+https://github.com/NVIDIA/apex"
    )
    spec = importlib.util.find_spec("apex")
    if spec is None or spec.origin is None:
        if gpu_present():
            return Finding("kernels", "apex", "missing", "not installed: torch's optimizer and norms are used", build)
        return Finding("kernels", "apex", "note", "not installed, and without a GPU of no use")
    # By its files: importing the unrelated package would run it.
    if not (Path(spec.origin).parent / "optimizers" / "fused_adam.py").is_file():
        found = "a package named apex that is not NVIDIA's (PyPI's apex is unrelated)"
        return Finding("kernels", "apex", "broken", found, f"{sys.executable} -m pip uninstall apex; then {build}")
    parts = {"FusedAdam": "amp_C", "weight-gradient accumulation": "fused_weight_gradient_mlp_cuda",
             "fused norms": "fused_layer_norm_cuda"}  # fmt: skip
    built = [name for name, module in parts.items() if package_present(module)]
    lacking = [name for name in parts if name not in built]
    if lacking:
        found = f"NVIDIA's, built without {', '.join(lacking)}"
        return Finding("kernels", "apex", "missing", found, build)
    return Finding("kernels", "apex", "ok", f"NVIDIA's, with {', '.join(built)}")


def slurm() -> list[Finding]:
    """The commands of Slurm; needed only where jobs are submitted."""
    found = {name: shutil.which(name) for name in ("sbatch", "srun", "squeue", "sinfo", "scancel")}
    if not any(found.values()):
        return [Finding("Slurm", "Slurm", "note", "not here: train starts its own ranks; submit from a login node")]
    missing = [name for name, path in found.items() if path is None]
    if missing:
        fix = "install slurm-client (Debian, Ubuntu) or slurm (Fedora), or load your site's module"
        return [Finding("Slurm", "Slurm", "missing", f"without {', '.join(missing)}", fix)]
    return [Finding("Slurm", "Slurm", "ok", _first_line(["sinfo", "--version"]) or "its commands are here")]


def our_packages(names: Sequence[str] = OUR_PACKAGES) -> list[Finding]:
    """Our packages have everyday names, so a person's own data.py could stand in their place."""
    root = project_root()
    found: list[Finding] = []
    for name in names:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin
        if origin is None or Path(origin).resolve().parent.parent != root:
            where = "not found" if origin is None else f"shadowed by {origin}"
            fix = f"export PYTHONSAFEPATH=1, and take what holds it out of PYTHONPATH; ours is {root / name}"
            found.append(Finding("our packages", name, "broken", where, fix, needed=True))
    found = found or [Finding("our packages", "imports", "ok", f"all {len(names)} resolve to {root}")]
    here = Path.cwd()
    strangers = [one for name in names if here != root for one in (f"{name}.py", name) if (here / one).exists()]
    if strangers and not os.environ.get("PYTHONSAFEPATH"):
        text = f"{', '.join(strangers)} in this folder would shadow ours in `python -m` and `python -c`"
        found.append(Finding("our packages", "working folder", "note", text, "export PYTHONSAFEPATH=1"))
    return found


def machine() -> list[Finding]:
    """Cores, memory, shared memory and disk, as this process may use them."""
    cores = len(os.sched_getaffinity(0))
    disk = shutil.disk_usage(Path.cwd())
    found = [
        Finding("machine", "Python", "ok", f"{sys.version.split()[0]} ({sys.executable})"),
        Finding("machine", "cores", "ok", f"{cores} for this process, {os.cpu_count()} in all"),
        Finding("machine", "memory", "ok", f"{_gib(memory_bytes())} for this process"),
        Finding("machine", "disk", "ok", f"{_gib(disk.free)} free of {_gib(disk.total)} at {Path.cwd()}"),
    ]
    shared = Path("/dev/shm")
    if shared.is_dir() and (total := shutil.disk_usage(shared).total) <= LEAST_SHARED_MEMORY:
        fix = "start the container with --shm-size=8g (or --ipc=host)"
        found.append(Finding("machine", "shared memory", "note", f"{total >> 20} MiB in /dev/shm", fix))
    return found


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory: the machine's, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = root / limit
        if file.is_file() and re.fullmatch(r"\d+", text := file.read_text().strip()):
            total = min(total, int(text))
    return total


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.strip().splitlines()
    return lines[0] if lines else None


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
