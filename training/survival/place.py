"""Where the main thread of this process is, found by another of its threads."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from training.survival.heartbeat import Details, Wait

FRAMES = 12
DISTRIBUTED = "/torch/distributed/"
PIPELINE = "/megatron/core/pipeline_parallel/p2p_communication.py"
NOT_AN_OPERATION = {"wrapper", "run", "wait", "<module>"}


def main_frame() -> FrameType | None:
    """The innermost Python frame of the main thread."""
    return sys._current_frames().get(threading.main_thread().ident or -1)


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a thread whose innermost frame this is waits for other ranks.

    gloo blocks inside torch.distributed's functions, or in the wait of core's pipeline communication. Over NCCL a
    collective returns at once, so this says nothing of the device.
    """
    return frame is not None and _is_communication(frame)


def details(frame: FrameType | None = None) -> Details:
    """What this rank tells the others once it has not got on for a while.

    Args:
        frame: the innermost one of the main thread; None: as it is now.
    """
    frame = frame or main_frame()
    wait = wait_at(frame) if frame is not None and is_waiting(frame) else None
    return Details(wait, tuple(shown(found) for found in frames_of(frame)[:FRAMES]), sequences())


def wait_at(frame: FrameType) -> Wait:
    """The collective that a thread waits in."""
    inside = []
    frames = frames_of(frame)
    while frames and _is_communication(frames[0]):
        inside.append(frames.pop(0))
    while frames and _is_wrapper(frames[0]):  # the platform's, around torch's own
        frames.pop(0)
    names = [found.f_code.co_name for found in inside if found.f_code.co_name not in NOT_AN_OPERATION]
    if inside and inside[0].f_code.co_filename.endswith(PIPELINE):
        operation = "the exchange between pipeline stages"
    else:
        operation = names[-1] if names else "a collective"
    asked_by = shown(frames[0]) if frames else "?"
    name, ranks = _group_of(inside)
    return Wait(operation, asked_by, name, ranks)


def sequences() -> dict[str, int]:
    """Collectives that this rank has begun, by group; of groups whose backend counts them."""
    found = {}
    for group, name in list(_world().pg_names.items()):
        number = _sequence(group)
        if number is not None:
            found[str(name)] = number
    return found


def _sequence(group: Any) -> int | None:
    try:
        return int(group._get_sequence_number_for_group())
    except RuntimeError:  # the backend keeps none
        return None


def _world() -> Any:
    return distributed_c10d._world


def _group_of(frames: list[FrameType]) -> tuple[str, tuple[int, ...]]:
    """Name and ranks of the group that the innermost frames that hold one work in."""
    if not dist.is_initialized():
        return "", ()
    for frame in frames:
        held = frame.f_locals
        for name in ("group", "pg", "pp_group"):
            if isinstance(held.get(name), dist.ProcessGroup):
                return _known(held[name])
        of_self = getattr(held.get("self"), "pp_group", None)
        if isinstance(of_self, dist.ProcessGroup):
            return _known(of_self)
    return _known(dist.group.WORLD)


def _known(group: Any) -> tuple[str, tuple[int, ...]]:
    name = _world().pg_names.get(group)
    return ("", ()) if name is None else (str(name), tuple(dist.get_process_group_ranks(group)))


def frames_of(frame: FrameType | None) -> list[FrameType]:
    """Innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _is_communication(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return DISTRIBUTED in file or file.endswith(PIPELINE) or _is_wrapper(frame)


def _is_wrapper(frame: FrameType) -> bool:
    """The CPU platform's functions around torch's collectives."""
    return frame.f_code.co_filename.endswith("/parallel/platform/collectives_on_cpu.py")


def shown(frame: FrameType) -> str:
    """file:line function, the file from its package on."""
    file = frame.f_code.co_filename
    _, _, short = file.rpartition("/site-packages/")
    parts = short.split("/") if short != file else file.split("/")[-2:]
    return f"{'/'.join(parts)}:{frame.f_lineno} {frame.f_code.co_name}"
