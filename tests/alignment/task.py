"""A task whose optimum is known: every answer to every prompt can be enumerated.

Prompts are three of six symbols; answers are up to LONGEST symbols and an end. The reward counts symbols that repeat
the prompt in place, and an end; the reference has learned noisy copies. With beta, the best policy is
reference x exp(reward / beta) up to a constant, and J* - J(policy) = beta KL(policy || best) for any policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.instruction import Example
from data.preferences import PreferencePair

PAD, END, SYMBOLS = 0, 1, tuple(range(2, 8))
VOCAB_SIZE, PROMPT_LENGTH, LONGEST = 8, 3, 4
SEQ_LENGTH = PROMPT_LENGTH + LONGEST
Answer = tuple[int, ...]


def prompts(count: int = 16, seed: int = 0) -> list[Answer]:
    everyone = list(itertools.product(SYMBOLS, repeat=PROMPT_LENGTH))
    chosen = np.random.default_rng(seed).permutation(len(everyone))[:count]
    return [everyone[number] for number in chosen]


def all_answers() -> list[Answer]:
    """1,555 of them: those that end, and those that are cut at LONGEST."""
    ended = [(*body, END) for size in range(LONGEST) for body in itertools.product(SYMBOLS, repeat=size)]
    return ended + list(itertools.product(SYMBOLS, repeat=LONGEST))


def reward(prompt: Answer, answer: Answer) -> float:
    copied = sum(one == other for one, other in zip(prompt, answer, strict=False))
    repeats = sum(one == other for one, other in itertools.pairwise(answer))
    return 0.8 * copied + 1.0 * (answer[-1] == END) - 0.3 * repeats


def rewards(asked: Sequence[Answer]) -> NDArray[np.float64]:
    """[prompts, answers]"""
    answers = all_answers()
    return np.array([[reward(prompt, answer) for answer in answers] for prompt in asked])


def example(prompt: Answer, answer: Answer) -> Example:
    tokens = np.array([*prompt, *answer], dtype=np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt))


def noisy_copies(asked: Sequence[Answer], count: int, seed: int) -> list[Example]:
    """What the reference learns."""
    draw = np.random.default_rng(seed)
    found = []
    for number in range(count):
        prompt = asked[number % len(asked)]
        body = draw.integers(2, VOCAB_SIZE, LONGEST)
        copied = draw.random(PROMPT_LENGTH) < 0.25
        body[:PROMPT_LENGTH] = np.where(copied, prompt, body[:PROMPT_LENGTH])
        size = int(draw.integers(1, LONGEST + 1))
        found.append(example(prompt, tuple(body[:size].tolist()) + ((END,) if size < LONGEST else ())))
    return found


def every_row(asked: Sequence[Answer]) -> list[PreferencePair]:
    """All answers to all prompts, two after two, for `alignment.scoring.values_of_pairs`."""
    rows = [example(prompt, answer) for prompt in asked for answer in all_answers()]
    return [PreferencePair(*two) for two in zip(rows[::2], [*rows[1::2], rows[-1]][: len(rows[::2])], strict=True)]


def preferences(
    asked: Sequence[Answer], log_reference: NDArray[np.float64], count: int, seed: int
) -> list[PreferencePair]:
    """Pairs of answers of the reference; the better one is chosen with probability sigmoid(difference of rewards)."""
    draw, answers, gold = np.random.default_rng(seed), all_answers(), rewards(asked)
    found: list[PreferencePair] = []
    while len(found) < count:
        row = len(found) % len(asked)
        share = np.exp(log_reference[row])
        one, other = draw.choice(len(answers), 2, p=share / share.sum())
        if one == other:
            continue
        if draw.random() > 1 / (1 + np.exp(gold[row, other] - gold[row, one])):
            one, other = other, one
        found.append(PreferencePair(example(asked[row], answers[one]), example(asked[row], answers[other])))
    return found


@dataclass(frozen=True)
class Standing:
    """How a policy stands to the optimum.

    Attributes:
        mass: probability of all answers together; 1 where nothing leaks to padding.
        gap: J* - J(policy), J = expected reward - beta KL(policy || reference).
        to_best: beta KL(policy || best): the same by another way.
        distance: total variation between policy and best, mean over prompts.
    """

    mass: float
    gap: float
    to_best: float
    distance: float


def standing(
    log_policy: NDArray[np.float64], log_reference: NDArray[np.float64], gold: NDArray[np.float64], beta: float
) -> Standing:
    """All arguments [prompts, answers]."""
    unnormalised = log_reference + gold / beta
    log_partition = np.log(np.exp(unnormalised).sum(1, keepdims=True))
    log_best, policy = unnormalised - log_partition, np.exp(log_policy)
    value = (policy * (gold - beta * (log_policy - log_reference))).sum(1).mean()
    return Standing(
        mass=float(policy.sum(1).mean()),
        gap=float(beta * log_partition.mean() - value),
        to_best=float(beta * (policy * (log_policy - log_best)).sum(1).mean()),
        distance=float(0.5 * np.abs(policy - np.exp(log_best)).sum(1).mean()),
    )
