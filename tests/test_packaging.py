"""The installed project: its command, its packages from any folder, its constraints."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("alignment", "checkpoint_tools", "data", "foundation", "launch", "model", "parallel", "training")


def python(code: str, folder: Path, *, safe_path: bool) -> str:
    """What `code` prints in `folder`, with the installed packages only."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if safe_path:
        environment["PYTHONSAFEPATH"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_command_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="orthant")
    assert [script.value for script in scripts] == ["launch.cli:main"]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_found_from_any_folder(package: str, tmp_path: Path) -> None:
    found = python(f"import {package}; print({package}.__file__)", tmp_path, safe_path=True)
    assert Path(found) == ROOT / package / "__init__.py"


def test_a_persons_own_data_py_does_not_shadow_ours(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text("")
    code = "import data; print(data.__file__)"
    assert Path(python(code, tmp_path, safe_path=True)) == ROOT / "data" / "__init__.py"
    # without PYTHONSAFEPATH it would: the rule is needed
    assert Path(python(code, tmp_path, safe_path=False)) == tmp_path / "data.py"


def test_the_makefile_sets_the_safe_path() -> None:
    assert re.search(r"^export PYTHONSAFEPATH := 1$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_constraints_fit_the_requirements() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    metadata = importlib.metadata.requires("orthant")
    assert metadata is not None
    for text in metadata:
        requirement = Requirement(text)
        if requirement.marker is not None and 'extra == "gpu"' in str(requirement.marker):
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} has no pin in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement} refuses the pin {pin}"
    assert not [version for version in pins.values() if "+" in version]
