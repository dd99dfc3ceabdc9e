"""Run one module's mutants: each in a fork of a process that has torch and pytest imported, but nothing of ours.

The fork imports the mutant in place of the module, whoever asks for it, and runs the module's tests until one fails.
Where tests start ranks, those import the module from the disk: such tests see no mutant and are for `ranks_see`.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.mutation.operators import Mutant
from benchmarks.record import ROOT

QUICK = (
    "-x",
    "-q",
    "-p",
    "no:cacheprovider",
    "-p",
    "pytest_timeout",
    "-p",
    "_hypothesis_pytestplugin",
    "--assert=plain",
)
"""Arguments of pytest: only plugins that the tests need, and no assertions rewritten for what nobody reads."""
LONGEST = 120
"""Seconds after which a mutant counts as one that hangs, which a test run shows as well."""


OURS = ("alignment", "checkpoint_tools", "data", "foundation", "launch", "model", "parallel", "tests", "training")


class _Loader(importlib.abc.Loader):
    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


class _Finder(importlib.abc.MetaPathFinder):
    """Gives the mutant where the module is asked for."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.loader = name, _Loader(path, source)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.machinery.ModuleSpec(name, self.loader, origin=str(self.loader.path))


def module_of(path: str) -> str:
    """`parallel/layout.py` -> `parallel.layout`."""
    return path.removesuffix(".py").replace("/", ".")


def outcome(path: str, source: str, tests: Sequence[str]) -> str:
    """What the tests say of a source in place of the module's: "killed", "survived" or "hung"."""
    child = os.fork()
    if child == 0:
        _be_a_mutant(path, source, tests)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return "hung"
    return "survived" if code == int(pytest.ExitCode.OK) else "killed"


class _WithoutRanks:
    """A plugin of pytest that leaves out what needs a pool of ranks."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if "ranks" not in getattr(item, "fixturenames", ())]


def _forget_our_modules() -> None:
    """So that whatever imports the module gets the mutant; the platform stays, for it has changed torch already."""
    for name in list(sys.modules):
        if name.split(".")[0] in OURS and not (name == "parallel" or name.startswith("parallel.platform")):
            del sys.modules[name]


def _be_a_mutant(path: str, source: str, tests: Sequence[str]) -> None:
    code = 99
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LONGEST)
        os.setsid()
        if os.environ.get("MUTATION_OUTPUT") is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        _forget_our_modules()
        sys.meta_path.insert(0, _Finder(module_of(path), ROOT / path, source))
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        code = int(pytest.main([*QUICK, *tests], plugins=[_WithoutRanks()]))
    finally:
        os._exit(code)


@contextlib.contextmanager
def scratch_checkout() -> Iterator[Path]:
    """A copy of what git tracks, in which a module can be overwritten."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for line in listed.splitlines():
            if line.endswith((".py", ".toml", ".json", ".yaml", ".txt")) and (ROOT / line).is_file():
                (folder / line).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / line, folder / line)
        yield folder


def ranks_see(folder: Path, path: str, mutant: Mutant, tests: Sequence[str]) -> str:
    """As `outcome`, in a process of its own whose ranks import the mutant from `folder` too."""
    whole = (folder / path).read_text()
    (folder / path).write_text(mutant.source)
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        return "hung"
    finally:
        (folder / path).write_text(whole)
    return "survived" if done.returncode == 0 else "killed"
