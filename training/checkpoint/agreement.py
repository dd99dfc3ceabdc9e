"""What ranks tell each other while they save and load. Every function here is collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from foundation.errors import WorkError

CURE = "free the disk or mend the folder's permissions, then run again"


def from_rank_0(ask: Callable[[], Any]) -> Any:
    """What `ask` returns on rank 0, on every rank; an error there ends all with the same message."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        answer = list(attempt(ask))
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def from_everyone(ask: Callable[[], Any]) -> list[Any]:
    """What `ask` returns, by rank; an error of one rank ends all with the same message."""
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, attempt(ask))
    for _, error in answers:
        if error is not None:
            raise error
    return [answer for answer, _ in answers]


def all_agree(here: bool) -> bool:
    """Whether `here` holds on every rank."""
    agreed = torch.tensor([here], dtype=torch.int32, device=torch.cuda.current_device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed)


def attempt(ask: Callable[[], Any]) -> tuple[Any, WorkError | None]:
    """(what `ask` returns, None), or (None, why the disk did not let it)."""
    try:
        return ask(), None
    except OSError as error:
        return None, WorkError(str(error), cure=CURE)
    except WorkError as error:
        return None, error
