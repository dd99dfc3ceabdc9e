"""Reward models: the scale of their scores, and what may be asked of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint_tools.manifest import Manifest, ScoreNormalisation, read_manifest
from data.order import permutation
from data.preferences import PreferencePair
from foundation.errors import RequestError
from parallel.layout import ParallelLayout

_NORMALISATION = 8  # a stream of data.order of its own


def some_of(pairs: Sequence[PreferencePair], count: int, seed: int) -> list[PreferencePair]:
    """`count` of `pairs` at most, drawn: the first ones of a set may be of one kind, or of the first source."""
    return [pairs[number] for number in permutation(len(pairs), seed, _NORMALISATION)[:count]]


def normalisation(
    chunks: Sequence[Any],
    layout: ParallelLayout,
    pairs: Sequence[PreferencePair],
    seq_length: int,
    micro_batch_size: int,
) -> ScoreNormalisation:
    """Mean and standard deviation of a reward model's scores over both answers of `pairs`. Collective."""
    from alignment.scoring import scores, values_of_pairs  # core comes after the platform

    found = values_of_pairs(chunks, layout, pairs, seq_length, micro_batch_size, scores)
    return ScoreNormalisation(mean=float(found.mean()), std=float(found.std()), answers=found.size)


def reward_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a finished reward model; `score` is there.

    Raises:
        RequestError: it is no reward model, or one whose training has not ended: without the scale of its scores a
            reward would be on none.
    """
    manifest = read_manifest(checkpoint)
    if manifest.head != "score":
        raise RequestError(
            "the checkpoint is no reward model", where=str(checkpoint), cure="the run.folder of an `orthant reward`"
        )
    if manifest.score is None or not manifest.score.std > 0:
        raise RequestError(
            "the reward model has no mean and deviation of its scores",
            where=str(checkpoint),
            rule="they are stored when its training ends, and rewards are normalised by them",
            cure="run the same `orthant reward` to its end",
        )
    return manifest
