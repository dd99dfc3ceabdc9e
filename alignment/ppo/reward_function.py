"""Rewards from a person's own Python function."""

from __future__ import annotations

import importlib.util
import traceback
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
        RequestError: there is no such file or function, or Python cannot run the file.
    """
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise RequestError(f"no file {file}", where="reward.function", cure="reward.function=FILE.py:NAME")
    described = importlib.util.spec_from_file_location("reward_function_of_the_run", path)
    if described is None or described.loader is None:
        raise RequestError(f"{file} is no Python file", where="reward.function", cure="reward.function=FILE.py:NAME")
    module: Any = importlib.util.module_from_spec(described)
    try:
        described.loader.exec_module(module)
    except Exception as error:
        raise RequestError(
            f"{file} cannot be run: {type(error).__name__}: {error}",
            where=place_of(error),
            cure="a file that Python runs by itself; it is imported on every rank",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RequestError(
            f"{file} has no function {name}", where="reward.function", cure="reward.function=FILE.py:NAME"
        )
    found: RewardFunction = function
    return found


def place_of(error: Exception) -> str:
    """FILE:LINE where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}"


def answers_of(rollout: Rollout, decode: Decode) -> list[Answer]:
    """Each row for people and functions."""
    found = []
    for row in range(len(rollout)):
        begin, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
        tokens = rollout.tokens[row].tolist()
        prompt, answer = tuple(tokens[:begin]), tuple(tokens[begin:end])
        found.append(Answer(decode(prompt), decode(answer), prompt, answer, bool(rollout.ended[row])))
    return found
