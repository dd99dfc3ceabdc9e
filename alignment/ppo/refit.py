"""The actor's weights into the layout that generates: planned once, moved after every update, proved to have arrived.

Core's description of a parameter (`model.global_tensors`) says which rectangle of which whole tensor a rank holds. The
rectangles that generation wants are cut out of those that the actor holds; the cuts are the plan. (Core has its own
planner in `core/resharding`, whose copying needs CUDA.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignment.ppo.links import Kind, Links
from foundation.errors import WorkError
from model.global_tensors import GlobalSlice, global_slices

MODULUS = 1 << 62
ODD = 0x9E3779B97F4A7C15 % MODULUS | 1

Stamps = dict[str, int]
"""A number for every whole tensor that changes with each of its bits and does not depend on the layout."""


@dataclass(frozen=True)
class Part:
    """A rectangle of a whole tensor on one rank of the run."""

    rank: int
    name: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    is_main: bool

    def overlap(self, other: Part) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(offset, size) of what both hold, None for nothing."""
        begins = tuple(map(max, self.offset, other.offset))
        ends = tuple(
            min(one + length, two + width)
            for one, length, two, width in zip(self.offset, self.size, other.offset, other.size, strict=True)
        )
        size = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        return (begins, size) if min(size) > 0 else None


@dataclass(frozen=True)
class Move:
    """A rectangle that `source` hands to `target`."""

    source: int
    target: int
    name: str
    offset: tuple[int, ...]
    size: tuple[int, ...]

    def cut(self, held: GlobalSlice) -> torch.Tensor:
        """The view of a rank's slice that moves."""
        places = (
            slice(begin - start, begin - start + length)
            for begin, start, length in zip(self.offset, held.offset, self.size, strict=True)
        )
        return held.tensor[tuple(places)]

    def lies_in(self, held: GlobalSlice) -> bool:
        """Whether a rank's slice holds the whole rectangle."""
        return held.name == self.name and all(
            start <= begin and begin + length <= start + width
            for begin, length, start, width in zip(self.offset, self.size, held.offset, held.tensor.shape, strict=True)
        )


def parts_here(chunks: Sequence[Any], rank: int) -> list[Part]:
    """What this rank holds of a model; its layout is in force."""
    return [
        Part(rank, one.name, one.offset, tuple(one.tensor.shape), one.is_main_replica)
        for one in global_slices(list(chunks))
    ]


def plan_moves(held: Iterable[Part], wanted: Iterable[Part]) -> tuple[Move, ...]:
    """How all wanted rectangles are filled from main replicas of held ones; what a rank holds itself it takes there.

    What lies beyond a held tensor is padding of the vocabulary and stays as it is.

    Raises:
        WorkError: a tensor that nobody holds, or one of which a part is missing.
    """
    main: dict[str, list[Part]] = defaultdict(list)
    copies: set[tuple[int, str, tuple[int, ...], tuple[int, ...]]] = set()
    for part in held:
        copies.add((part.rank, part.name, part.offset, part.size))
        if part.is_main:
            main[part.name].append(part)
    moves: list[Move] = []
    for part in wanted:
        overlaps = [(one, both) for one in main[part.name] if (both := one.overlap(part)) is not None]
        for one, (offset, size) in overlaps:
            own = (part.rank, one.name, one.offset, one.size) in copies
            moves.append(Move(part.rank if own else one.rank, part.rank, part.name, offset, size))
        found = sum(torch.Size(size).numel() for _, (_, size) in overlaps)
        needed = _elements_within(part, main[part.name])
        if found != needed or not main[part.name]:
            raise WorkError(
                f"the actor holds {found} of the {needed} elements of {part.name} that generation needs",
                cure="report it with the run's config.yaml",
            )
    return tuple(moves)


def _elements_within(part: Part, whole: Sequence[Part]) -> int:
    """How many elements of `part` lie inside the tensor that `whole` makes up."""
    ends = [max((one.offset[axis] + one.size[axis] for one in whole), default=0) for axis in range(len(part.size))]
    inside = (
        max(0, min(start + size, end) - start) for start, size, end in zip(part.offset, part.size, ends, strict=True)
    )
    return torch.Size(inside).numel()


class Refit:
    """Moves weights along a plan. `send` and `receive` are called by every rank that holds one side.

    Args:
        moves: the whole plan, the same on every rank.
        links: between all ranks.
    """

    def __init__(self, moves: Sequence[Move], links: Links) -> None:
        self._moves, self._links = moves, links
        self._kept: dict[int, torch.Tensor] = {}

    def send(self, chunks: Sequence[Any]) -> None:
        """Hand out what this rank holds; the actor's layout is in force. What stays here is kept for `receive`."""
        slices = list(global_slices(list(chunks)))
        for target, moves in self._by(lambda one: one.source, lambda one: one.target).items():
            flat = torch.cat([_slice_of(move, slices).reshape(-1) for move in moves]).cpu()
            if target == self._links.rank:
                self._kept[target] = flat
            else:
                self._links.send_tensor(target, Kind.WEIGHTS, _as_bytes(flat))

    @torch.no_grad()
    def receive(self, chunks: Sequence[Any]) -> None:
        """Take in what this rank needs; generation's layout is in force."""
        slices = list(global_slices(list(chunks)))
        for source, moves in self._by(lambda one: one.target, lambda one: one.source).items():
            targets = [_slice_of(move, slices) for move in moves]
            if source == self._links.rank:
                flat = self._kept.pop(source)
            else:
                flat = torch.empty(sum(one.numel() for one in targets), dtype=targets[0].dtype)
                self._links.receive_tensor(source, Kind.WEIGHTS, _as_bytes(flat))
            for target, part in zip(targets, flat.split([one.numel() for one in targets]), strict=True):
                target.copy_(part.view(target.shape))

    def _by(self, mine: Any, other: Any) -> dict[int, list[Move]]:
        found: dict[int, list[Move]] = defaultdict(list)
        for move in self._moves:
            if mine(move) == self._links.rank:
                found[other(move)].append(move)
        return found


def stamps_here(chunks: Sequence[Any]) -> Stamps:
    """This rank's share of the stamps of all tensors; shares add up modulo `MODULUS`. Its layout is in force."""
    found: Stamps = defaultdict(int)
    for one in global_slices(list(chunks)):
        if one.is_main_replica:
            found[one.name] = (found[one.name] + _stamp(one)) % MODULUS
    return dict(found)


def added_up(shares: Iterable[Stamps]) -> Stamps:
    """The stamps of whole tensors."""
    found: Stamps = defaultdict(int)
    for share in shares:
        for name, value in share.items():
            found[name] = (found[name] + value) % MODULUS
    return dict(found)


def digest(stamps: Stamps) -> int:
    """One number for all."""
    whole = 0
    for name in sorted(stamps):
        whole = (whole * ODD + stamps[name] + len(name)) % MODULUS
    return whole


def refuse_other_weights(wanted: Stamps, found: Stamps, version: int) -> None:
    """Raise where generation does not hold the actor's weights.

    Raises:
        WorkError: naming tensors that differ.
    """
    other = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if other:
        raise WorkError(
            f"after the refit of update {version} generation holds other weights than the actor in "
            f"{len(other)} of {len(wanted)} tensors, {', '.join(other[:3])} first",
            cure="report it with the run's config.yaml",
        )


def _stamp(part: GlobalSlice) -> int:
    """Sum of bits x an odd number for each place, which row and column make up; exact in wrapping 64-bit integers."""
    tensor = part.tensor if part.tensor.dim() == 2 else part.tensor.reshape(part.tensor.shape[0], -1)
    kind = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()]
    bits = tensor.contiguous().view(kind).to(torch.int64)
    rows = torch.arange(part.offset[0], part.offset[0] + tensor.shape[0], device=tensor.device)
    first = part.offset[1] if len(part.offset) > 1 else 0
    columns = torch.arange(first, first + tensor.shape[1], device=tensor.device)
    found = ((bits * (2 * columns * 7919 + 1)).sum(dim=1) * (2 * rows * 104729 + 1)).sum()
    return int(found) % MODULUS


def _slice_of(move: Move, slices: Sequence[GlobalSlice]) -> torch.Tensor:
    return next(move.cut(one) for one in slices if move.lies_in(one))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)
