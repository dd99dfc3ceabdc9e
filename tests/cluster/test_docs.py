"""What docs/slurm.md tells people to type into Slurm and to write in Python: it is taken as it stands there."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.slurm_config import Shape

PAGE = (REPOSITORY / "docs" / "slurm.md").read_text()
HEADS = [path.read_text() for path in sorted((REPOSITORY / "slurm").glob("*.sbatch"))]


def sbatch_commands(text: str) -> list[str]:
    """Commands that begin with sbatch, in a page or in the head of a script; lines that go on are joined."""
    joined = re.sub(r" \\\n#? +", " ", text)
    return re.findall(r"^(?: {4}|# {3})(sbatch .*)$", joined, flags=re.MULTILINE)


COMMANDS = sorted({command for text in (PAGE, *HEADS) for command in sbatch_commands(text)})


@pytest.mark.timeout(120)
def test_slurm_takes_every_sbatch_command_of_the_page_and_of_the_scripts(tmp_path: Path) -> None:
    assert len(COMMANDS) > 10
    with Cluster(
        tmp_path / "large", Shape(nodes=6, cpus=128, memory_mib=8000, gpus=8), shared=(REPOSITORY,)
    ) as cluster:
        for command in COMMANDS:
            words = ["--partition=all" if word == "--partition=cpu" else word for word in shlex.split(command)]
            answer = cluster.controller.run(words[0], "--test-only", *words[1:], cwd=REPOSITORY, check=False)
            assert answer.returncode == 0, f"{command}\n{answer.stderr}"
            script = next(word for word in words if word.endswith(".sbatch"))
            assert (REPOSITORY / script).is_file(), command


@pytest.mark.timeout(120)
def test_the_lines_of_python_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^    with Cluster.*\n(?:^        .*\n)+", PAGE, flags=re.MULTILINE)
    exec(textwrap.dedent(block), {"Cluster": Cluster, "folder": tmp_path / "cluster"})
    assert capsys.readouterr().out in ("COMPLETED\n", "FAILED\n")  # the job may have ended before its node crashed
