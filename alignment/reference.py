"""Log-probabilities of answers under a reference, computed once and kept beside the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from alignment.examples import pair_hash
from alignment.scoring import answers, values_of_pairs
from data.fingerprints import combined
from data.preferences import PreferencePair
from foundation.files import whole_file
from training.checkpoint.tensors import read_weights
from training.state import TrainingState


def reference_of_pairs(
    state: TrainingState,
    pairs: Sequence[PreferencePair],
    seq_length: int,
    micro_batch_size: int,
    kept: Path,
    checkpoint: Path | None,
    say: Callable[[str], None],
) -> NDArray[np.float64]:
    """[pairs, 2]: of each chosen and rejected answer; the same on every rank. Collective.

    Args:
        state: with the weights that training begins with.
        kept: where they are kept: a run that resumes has other weights by then.
        checkpoint: the reference; None: what `state` holds.
    """
    key = combined([*map(pair_hash, pairs), str(checkpoint)])
    if dist.get_rank() == 0:
        found = _read(kept, key)
    holder = [None if dist.get_rank() else found]
    dist.broadcast_object_list(holder, src=0)
    if holder[0] is not None:
        return holder[0]
    say(f"computing the reference's log-probabilities of {2 * len(pairs)} answers")
    own = None
    if checkpoint is not None:
        own = [{name: value.clone() for name, value in _tensors(chunk)} for chunk in state.chunks]
        read_weights(state.chunks, checkpoint)
    values = values_of_pairs(state.wrapped, state.layout, pairs, seq_length, micro_batch_size, answers)
    if own is not None:
        with torch.no_grad():
            for chunk, before in zip(state.chunks, own, strict=True):
                for name, value in _tensors(chunk):
                    value.copy_(before[name])
    if dist.get_rank() == 0:
        with whole_file(kept) as handle:
            np.savez(handle, key=np.array(key), values=values)
    return values


def _tensors(chunk: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter.data) for name, parameter in chunk.named_parameters()]


def _read(path: Path, key: str) -> NDArray[np.float64] | None:
    """What was computed for these pairs and this reference; None where nothing was."""
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as kept:
        return np.asarray(kept["values"]) if str(kept["key"]) == key else None
