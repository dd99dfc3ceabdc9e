"""What a person sees on a terminal, in a pipe, on a dumb terminal, with --quiet; stdout is for results alone."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from launch import terminal
from launch.bars import progress_bar
from launch.progress import Progress
from training.records import StepRecord

ROOT = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", terminal.QUIET):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize(
    ("variables", "on_terminal", "in_pipe"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
    ],
)
def test_colour(variables: dict[str, str], on_terminal: bool, in_pipe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert terminal.wants_colour(Terminal()) is on_terminal
    assert terminal.wants_colour(io.StringIO()) is in_pipe


def test_a_bar_needs_a_terminal_that_takes_lines_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal.wants_bar(Terminal()) and not terminal.wants_bar(io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not terminal.wants_bar(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.wants_bar(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(terminal.QUIET, "1")
    assert not terminal.wants_bar(Terminal())


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step, loss=2.0, grad_norm=1.0, lr=1e-3, tokens=step * 10, tokens_per_second=100.0, step_seconds=0.1,
        mfu=None, mfu_full_attention=None, validation_loss=None, guard=None,
    )  # fmt: skip


def test_quiet_leaves_what_happened_and_no_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> str:
        progress = Progress()
        progress.begin(1, 2)
        progress.step_done(record(1))
        progress.event("step 1: the loss is not finite: skip")
        progress.step_done(record(2))
        progress.end()
        terminal.say("preparing")
        terminal.tell("wrote it")
        with progress_bar("convert") as show:
            show(1, 2)
        return capsys.readouterr().err

    said = run()
    assert "step 2/2" in said and "preparing" in said
    monkeypatch.setenv(terminal.QUIET, "1")
    assert run().splitlines() == ["step 1: the loss is not finite: skip", "wrote it"]


def test_counted_work_tells_lines_in_a_pipe_and_nothing_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.bars.PLAIN_SECONDS", 0.0)
    with progress_bar("generate", "answers") as progress, progress_bar("evaluate", "pieces", shown=False) as silent:
        progress(1, 2000)
        silent(1, 2)
    assert capsys.readouterr().err == "generate: 1 of 2,000 answers\n"
    monkeypatch.setenv(terminal.QUIET, "1")
    with progress_bar("generate", "answers") as progress:
        progress(2, 2000)
    assert capsys.readouterr().err == ""


def in_pty(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str, str]:
    """A command whose stderr is a terminal and whose stdout is a pipe: (exit code, stdout, what the terminal got)."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment},
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            seen += part
        assert process.stdout is not None
        out = process.stdout.read().decode()
    os.close(ours)
    return process.returncode, out, seen.decode()


CLEAN = ("data", "clean", "texts.jsonl", "--out", "clean", "--rules", "none", "--restart", "--json")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": f"Text number {number} of some length. " * 5}) for number in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "options", "has_bar", "has_result"),
    [
        ({"TERM": "xterm"}, (), True, True),
        ({"TERM": "dumb"}, (), False, True),
        ({"TERM": "xterm"}, ("--quiet",), False, True),
    ],
)
def test_cleaning_on_a_terminal(
    environment: dict[str, str], options: tuple[str, ...], has_bar: bool, has_result: bool, texts: Path
) -> None:
    code, out, seen = in_pty(*CLEAN, *options, cwd=texts, **environment)
    assert code == 0 and json.loads(out)["documents_out"] == 40
    assert ("\x1b[" in seen) is has_bar
    assert ("wrote clean" in seen) is has_result


def test_an_error_on_a_terminal_is_red_unless_no_color(tmp_path: Path) -> None:
    for variables, red in (({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False)):
        code, out, seen = in_pty("config", "show", "nowhere.yaml", cwd=tmp_path, **variables)
        assert code == 2 and out == "" and "nowhere.yaml does not exist" in seen
        assert ("\x1b[1;31m" in seen) is red


def test_a_run_that_ends_with_an_error_gives_the_cursor_back() -> None:
    """Whoever raises, a guard or a lost peer, ends no watcher."""
    code = "from launch.progress import Progress; run = Progress(); run.begin(1, 5); raise SystemExit('a guard stops')"
    ours, theirs = pty.openpty()
    given = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, env=given, timeout=60, check=False)
    os.close(theirs)
    said = b""
    while (part := _read(ours)) != b"":
        said += part
    os.close(ours)
    assert done.returncode == 1 and b"a guard stops" in said
    hidden, shown = b"\x1b[?25l", b"\x1b[?25h"
    assert hidden in said and said.rindex(shown) > said.rindex(hidden)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux' end of a terminal whose other end is closed
        return b""
