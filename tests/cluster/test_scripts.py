"""Every file in slurm/: what bash and shellcheck say, what it declares, and that nothing of it is written twice."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY
from tests.cluster.waiting import PATIENCE

LIBRARY = REPOSITORY / "slurm" / "lib.sh"
SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sbatch"))


@pytest.mark.parametrize("path", [LIBRARY, *SCRIPTS], ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(path: Path) -> None:
    for command in (["bash", "-n"], ["shellcheck", "--severity=style", "--external-sources"]):
        ask = [*command, str(path)]
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=REPOSITORY)
        assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_can_be_requeued_and_is_asked_to_stop_before_its_time_limit(path: Path) -> None:
    text = path.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, flags=re.MULTILINE))
    assert {"requeue", "time", "job-name", "output"} <= set(options)
    assert options["signal"].startswith("B:USR1@") and options["open-mode"] == "append"
    assert options["job-name"] == path.stem
    assert '\nsource "$home/slurm/lib.sh"\n' in text
    assert f"sbatch slurm/{path.name} " in text, "its head says how it is submitted"
