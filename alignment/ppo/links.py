"""Messages between ranks of different stations, over gloo on the hosts.

A sender goes on at once; a receiver names the sender and the kind, so that what comes when decides the time alone.
Messages of one kind from one rank arrive in the order in which they were sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch

from alignment.ppo.rows import Tensors
from foundation.errors import LostRankError, WorkError

TYPES = {str(one): one for one in (torch.int64, torch.float32, torch.bool, torch.uint8)}


class Kind(IntEnum):
    """What a message is about; gloo's tag."""

    PLAN = 1
    ORDER = 2
    ROLLOUT = 3
    REFERENCE = 4
    REWARD = 5
    VALUES = 6
    RETURNS = 7
    CRITIC = 8
    WEIGHTS = 9
    LIFE = 10


@dataclass(frozen=True)
class Message:
    """Tensors and what else is said, as JSON takes it."""

    notes: dict[str, Any] = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)

    def packed(self) -> torch.Tensor:
        """uint8 [bytes]: a JSON line that describes, then the tensors."""
        described = [[name, str(one.dtype), list(one.shape)] for name, one in self.tensors.items()]
        head = (json.dumps({"notes": self.notes, "tensors": described}) + "\n").encode()
        parts = [torch.frombuffer(bytearray(head), dtype=torch.uint8)]
        parts += [one.contiguous().reshape(-1).view(torch.uint8) for one in self.tensors.values() if one.numel()]
        return torch.cat(parts)

    @classmethod
    def unpacked(cls, packed: torch.Tensor) -> Message:
        """What was packed.

        Raises:
            WorkError: it is damaged.
        """
        data = packed.numpy().tobytes()
        head, _, rest = data.partition(b"\n")
        try:
            described = json.loads(head)
            tensors, at = {}, 0
            for name, kind, shape in described["tensors"]:
                size = torch.Size(shape).numel() * TYPES[kind].itemsize
                part = bytearray(rest[at : at + size])
                tensors[name] = (torch.frombuffer(part, dtype=TYPES[kind]) if size else torch.empty(0)).reshape(shape)
                at += size
            return cls(described["notes"], tensors)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise WorkError(f"a message or a file of rows is damaged: {error}", cure="run again: it resumes") from error


class Links:
    """This rank's sending and receiving.

    Args:
        group: gloo, of all ranks of the run.
        rank: of this process there.
        name_of: for messages: who a rank is.
    """

    def __init__(self, group: Any, rank: int, name_of: Callable[[int], str]) -> None:
        self._group, self.rank, self._name_of = group, rank, name_of
        self._sent: list[tuple[Any, torch.Tensor, int]] = []

    def send(self, target: int, kind: Kind, message: Message) -> None:
        """Asynchronous; `finish` waits."""
        packed = message.packed()
        self.send_tensor(target, kind, torch.tensor([len(packed)], dtype=torch.int64))
        self.send_tensor(target, kind, packed)

    def receive(self, source: int, kind: Kind) -> Message:
        """The next of that kind from `source`.

        Raises:
            LostRankError: it has gone, or did not send within the timeout.
        """
        size = torch.zeros(1, dtype=torch.int64)
        self.receive_tensor(source, kind, size)
        packed = torch.empty(int(size), dtype=torch.uint8)
        self.receive_tensor(source, kind, packed)
        return Message.unpacked(packed)

    def send_tensor(self, target: int, kind: Kind, tensor: torch.Tensor) -> None:
        """A tensor on the host, contiguous, which stays as it is until it has arrived."""
        self._sent = [one for one in self._sent if not one[0].is_completed()]
        self._sent.append((self._try(target, lambda: self._group.send([tensor], target, int(kind))), tensor, target))

    def receive_tensor(self, source: int, kind: Kind, tensor: torch.Tensor) -> None:
        """Into `tensor`, of the shape that was sent."""
        self._try(source, lambda: self._group.recv([tensor], source, int(kind)).wait())

    def finish(self) -> None:
        """Wait for what was sent."""
        for work, _, target in self._sent:
            self._try(target, work.wait)
        self._sent.clear()

    def _try(self, other: int, action: Callable[[], Any]) -> Any:
        # `alignment.ppo.whereabouts` reads `other` of this very function while it waits.
        try:
            return action()
        except RuntimeError as error:
            raise LostRankError(
                f"rank {self.rank} ({self._name_of(self.rank)}) lost rank {other} ({self._name_of(other)})",
                where=str(error).splitlines()[0][:200],
                cure="run the same command again: it continues from the newest checkpoint",
            ) from error
