"""The recipe of the container: pinned, without secrets or sources, of the versions that the project asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "slurm/container/Dockerfile"


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def faults(text: str) -> list[str]:
    """What is wrong with a recipe."""
    found = instructions(text)
    wrong = []
    images = [rest for word, rest in found if word == "FROM"]
    if len(images) != 1 or not re.fullmatch(
        r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3(@sha256:[0-9a-f]{64})?", images[0]
    ):
        wrong.append(f"FROM is one pinned image of NVIDIA's: {images}")
    for word, rest in found:
        if re.search(r"(?i)(token|password|secret|api_?key)\s*=", rest):
            wrong.append(f"{word} holds a secret: {rest}")
        if word == "ADD" or (word == "COPY" and rest.split()[0] == "."):
            wrong.append(f"{word} takes more than what is named: {rest}")
    installs = [part for word, rest in found if word == "RUN" for part in rest.split("&&") if "pip install" in part]
    for install in installs:
        pinned = "-c pins.txt" in install or re.search(r"torch==\d+\.\d+\.\d+", install)
        if not pinned:
            wrong.append(f"an install without pins: {install.strip()}")
    return wrong if installs else [*wrong, "nothing is installed"]


def test_the_recipe_is_sound() -> None:
    assert not faults(RECIPE.read_text())


def test_versions_are_the_projects() -> None:
    text = RECIPE.read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["gpu"])]
    for name, pattern in (
        ("torch", r" torch==([\d.]+)"),
        ("transformer-engine", r"transformer_engine\[.*?\]==([\d.]+)"),
    ):
        (version,) = re.findall(pattern, text)
        specifier = next(one.specifier for one in wanted if one.name == name)
        assert specifier.contains(version), (name, version)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pytorch:25.12-py3", "pytorch:latest"),
        ("ARG BUILD_JOBS=8", "ENV HF_TOKEN=abc"),
        ("-c pins.txt -r", "-r"),
        ("COPY pyproject.toml", "COPY . "),
        ("FROM nvcr.io/nvidia/", "FROM somewhere/"),
    ],
)
def test_what_is_wrong_is_seen(old: str, new: str) -> None:
    text = RECIPE.read_text()
    assert old in text and faults(text.replace(old, new))
