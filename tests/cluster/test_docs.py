"""What the pages tell people to type into Slurm, and slurm.md to write in Python: it is taken as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.slurm_config import Shape
from tests.docs.blocks import all_blocks, commands_of

BLOCKS = all_blocks()
HEADS = [path.read_text() for path in sorted((REPOSITORY / "slurm").glob("*.sbatch"))]


def in_head(text: str) -> list[list[str]]:
    """Commands in the head of a script; lines that go on are joined."""
    joined = re.sub(r" \\\n# +", " ", text)
    return [words for line in re.findall(r"^# {3}(sbatch .*)$", joined, flags=re.M) for words in commands_of(line)]


def in_pages() -> list[list[str]]:
    """Those of the README and all pages."""
    shells = (block for block in BLOCKS if block.language in ("sh", "usage"))
    return [words for block in shells for words in commands_of(block.text) if words[0] == "sbatch"]


IN_HEADS = [words for head in HEADS for words in in_head(head)]
COMMANDS = [list(words) for words in sorted({tuple(words) for words in (*in_pages(), *IN_HEADS)})]


def test_slurm_takes_every_sbatch_command_of_the_page_and_of_the_scripts(tmp_path: Path) -> None:
    assert len(COMMANDS) > 10
    with Cluster(
        tmp_path / "large", Shape(nodes=6, cpus=128, memory_mib=8000, gpus=8), shared=(REPOSITORY,)
    ) as cluster:
        for command in COMMANDS:
            words = ["--partition=all" if word == "--partition=cpu" else word for word in command]
            answer = cluster.controller.run(words[0], "--test-only", *words[1:], cwd=REPOSITORY, check=False)
            assert answer.returncode == 0, f"{command}\n{answer.stderr}"
            script = next(word for word in words if word.endswith(".sbatch"))
            assert (REPOSITORY / script).is_file(), command


def test_the_lines_of_python_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in BLOCKS if (block.page, block.language) == ("slurm.md", "python"))
    exec(block.text, {"Cluster": Cluster, "folder": tmp_path / "cluster"})
    assert capsys.readouterr().out in ("COMPLETED\n", "FAILED\n")  # the job may have ended before its node crashed
