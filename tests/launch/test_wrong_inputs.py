"""docs/wrong_inputs.md: what people type wrong most, and that every answer teaches."""

from __future__ import annotations

import re
import shlex

import pytest

from scripts.wrong_inputs import PAGE, PARTS, Answer, answers, page


@pytest.fixture(scope="module")
def seen() -> dict[str, list[tuple[str, Answer]]]:
    return answers()


def test_the_page_is_what_the_commands_print(seen: dict[str, list[tuple[str, Answer]]]) -> None:
    assert PAGE.read_text() == page(seen), "run: .venv/bin/python -m scripts.wrong_inputs"


def test_every_command_of_the_program_is_there() -> None:
    typed = {shlex.split(command)[1] for entries in PARTS.values() for _, command in entries}
    asked = set(
        "train verify rehearse data convert ckpt generate evaluate sft reward dpo ppo plan submit scale report".split()
    )
    assert asked <= typed
    assert sum(map(len, PARTS.values())) >= 30


def test_every_answer_says_what_where_the_rule_and_a_cure(seen: dict[str, list[tuple[str, Answer]]]) -> None:
    for name, one in (entry for entries in seen.values() for entry in entries):
        assert (one.code, one.out, one.written) == (2, "", frozenset()), name
        assert "Traceback" not in one.err, name
        what = one.err.splitlines()[0]
        if what.startswith("Usage: "):  # a word of the command line itself: the library's form
            assert ("Error: " in one.err and "--help" in one.err) or "-h" in one.err, name
            continue
        assert re.search(r"^  rule: \S", one.err, re.MULTILINE), name
        assert re.search(r"^  cure: \S", one.err, re.MULTILINE), name
        # Where: a line of a file, or a word of the command.
        words = [word for word in re.split(r"[\s=,/]+", one.command) if len(word) > 2]
        assert "  where: " in one.err or any(word in what for word in words) or what.startswith(("no ", "there ")), name
