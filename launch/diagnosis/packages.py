"""The packages that the project needs, and our own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from launch.diagnosis.finding import Finding

OUR_PACKAGES = ("foundation", "parallel", "data", "model", "checkpoint_tools", "training", "alignment", "launch")


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
    return Path(__file__).resolve().parents[2]


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
