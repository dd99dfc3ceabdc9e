"""Rewards from a person's own Python function."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.errors import RequestError

if TYPE_CHECKING:
    from alignment.ppo.rows import Rollout


@dataclass(frozen=True)
class Answer:
    """What a reward function sees of an answer.

    Attributes:
        prompt, text: without special tokens.
        prompt_tokens, tokens: with them; the last of `tokens` is the stop token where `ended`.
    """

    prompt: str
    text: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    ended: bool


RewardFunction = Callable[[list[Answer]], Sequence[float]]
Decode = Callable[[Sequence[int]], str]


def load_function(named: str) -> RewardFunction:
    """The function that FILE.py:NAME names.

    Raises:
        RequestError: there is no such file or function.
    """
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise RequestError(f"no file {file}", where="reward.function", cure="reward.function=FILE.py:NAME")
    described = importlib.util.spec_from_file_location("reward_function_of_the_run", path)
    assert described is not None and described.loader is not None
    module: Any = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise RequestError(
            f"{file} has no function {name}", where="reward.function", cure="reward.function=FILE.py:NAME"
        )
    found: RewardFunction = function
    return found


def answers_of(rollout: Rollout, decode: Decode) -> list[Answer]:
    """Each row for people and functions."""
    found = []
    for row in range(len(rollout)):
        begin, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
        tokens = rollout.tokens[row].tolist()
        prompt, answer = tuple(tokens[:begin]), tuple(tokens[begin:end])
        found.append(Answer(decode(prompt), decode(answer), prompt, answer, bool(rollout.ended[row])))
    return found
