"""Where rewards come from, and a person's own function that is none or fails."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest

from alignment.ppo.config import RewardSourceSection
from alignment.ppo.judges import FunctionReward
from alignment.ppo.reward_function import load_function
from foundation.errors import ConfigError, RequestError, WorkError
from parallel.layout import ParallelLayout
from tests.alignment.ppo.test_mathematics import some_rollout


def test_a_reward_comes_from_one_place() -> None:
    for given in ({}, {"checkpoint": "a", "function": "b.py:c"}, {"function": "b.py"}):
        with pytest.raises(ConfigError, match="reward"):
            RewardSourceSection.model_validate(given)
    with pytest.raises(RequestError, match="no file"):
        load_function("nowhere.py:score")


def test_a_reward_function_that_fails_is_named_with_its_place(tmp_path: Path) -> None:
    for text, said in (("def f(:", "SyntaxError"), ("import nowhere_at_all", "ModuleNotFoundError")):
        (tmp_path / "broken.py").write_text(text)
        with pytest.raises(RequestError, match=said) as refused:
            load_function(f"{tmp_path / 'broken.py'}:f")
        assert refused.value.where == f"{tmp_path / 'broken.py'}:1"
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(RequestError, match="no Python file"):
        load_function(f"{tmp_path / 'rows.jsonl'}:f")
    layout = ParallelLayout()
    for wrong, said in (
        (lambda _: 1 / 0, "ZeroDivisionError"),
        (lambda _: None, "TypeError"),
        (lambda _: ["good"] * 4, "ValueError"),
        (lambda _: [1.0], "1 scores for 4"),
        (lambda _: [1.0, 2.0, 3.0, math.nan], "not finite"),
    ):
        with mock.patch("alignment.ppo.judges.is_holder", lambda _: True), pytest.raises(WorkError, match=said):
            FunctionReward(layout, wrong).judge(some_rollout())  # type: ignore[arg-type]  # wrong on purpose
