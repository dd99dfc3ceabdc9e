"""What TAB offers, that it comes without heavy imports, and that bash takes it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer

from foundation.accelerators import devices
from foundation.errors import RequestError
from launch import cli, completion
from model.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]


def offered(*words: str) -> list[str]:
    return completion.suggestions(typer.main.get_command(cli.app), words)


def test_commands_groups_and_options_are_offered() -> None:
    assert {"train", "init", "doctor", "data", "ckpt"} <= set(offered(""))
    assert "complete" not in offered("") and offered("tr") == ["train"]
    assert offered("data", "to") == ["tokenize", "tokenizer"]
    assert {"--out", "--tokenizer", "--quiet"} <= set(offered("data", "tokenize", "--"))
    assert "--quiet" in offered("train", "--") and "--quiet" in offered("plan", "run.yaml", "--")
    assert offered("plan", "pre") == ["predict"]
    assert offered("nonsense", "x", "") == []


def test_values_are_those_that_the_commands_take() -> None:
    assert offered("init", "--preset", "") == list(PRESETS)
    assert offered("plan", "run.yaml", "--gpu", "") == list(devices())
    assert offered("convert", "a", "b", "--verify", "l") == ["logits"]
    assert offered("train", "--json", "") == []
    from launch.cli_cluster import submit
    from launch.commands.convert import CHECKS, DTYPES, FORMATS
    from launch.commands.data import Kind
    from launch.commands.data_clean import Stage
    from launch.submission.request import Launcher, Task

    assert set(completion.VALUES["--task"]) == set(typing.get_args(Task)) and submit is not None
    assert set(completion.VALUES["--launcher"]) == set(typing.get_args(Launcher))
    assert set(completion.VALUES["--to"]) == set(FORMATS) and completion.VALUES["--dtype"] == DTYPES
    assert set(offered("convert", "--verify", "")) == set(CHECKS)
    assert set(completion.VALUES["--kind"]) == {kind.value for kind in Kind}
    assert completion.VALUES["--stage"] == tuple(stage.value for stage in Stage)


def test_settings_are_offered_behind_the_configuration() -> None:
    assert offered("train", "") == []  # files: the shell's business
    assert offered("train", "run.yaml", "training.train_") == ["training.train_steps="]
    assert "parallel.tensor_model_parallel_size=" in offered("verify", "run.yaml", "a.b=1", "par")
    assert offered("ppo", "run.yaml", "ppo.kl_t") == ["ppo.kl_target="]
    assert offered("train", "run.yaml", "ppo.") == []


def test_an_unknown_shell_is_refused() -> None:
    with pytest.raises(RequestError, match="bash, zsh, fish"):
        completion.script("tcsh")


def test_tab_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom launch.cli import main\n"
        "main(['complete', '--', 'data', 'tokenize', '--'])\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'datasets', 'rich', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert "--tokenizer\n" in answer.stdout


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("orthant data insp", "inspect"),
        ("orthant train my.yaml optimizer.l", "optimizer.lr="),
        ("orthant ckpt d", "diff"),
    ],
)
def test_bash_completes(line: str, reply: str, tmp_path: Path) -> None:
    command = tmp_path / "orthant"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m launch "$@"\n')
    command.chmod(0o755)
    words = line.split()
    script = (
        f'{completion.script("bash")}\ncompopt() {{ echo "compopt $*"; }}\n'
        f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _orthant orthant; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    answer = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert answer.stdout.split("\n")[:-1] == [*(["compopt -o nospace"] if reply.endswith("=") else []), reply]


@pytest.mark.parametrize("shell", ["zsh", "fish", "bash"])
def test_the_script_is_one_that_the_shell_reads(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    file = tmp_path / "script"
    file.write_text(completion.script(shell))
    assert subprocess.run([shell, "-n", str(file)], check=False, timeout=300).returncode == 0
