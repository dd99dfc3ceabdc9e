"""The plan of a conversion, and what has to be true of it before a byte is written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from checkpoint_tools.catalog import Catalog, Format, cover_fault, state_fault
from checkpoint_tools.dtypes import DType
from checkpoint_tools.formats.distributed import SCORE_HEAD
from checkpoint_tools.formats.distributed_target import plan_distributed
from checkpoint_tools.formats.hugging_face import plan_hugging_face
from checkpoint_tools.formats.megatron_target import plan_megatron
from checkpoint_tools.formats.rank_cuts import ONE_RANK, RankGrid
from checkpoint_tools.target import Target
from foundation.errors import RequestError, WorkError


@dataclass(frozen=True)
class Form:
    """What is to be written, of whatever source.

    Attributes:
        to: the format.
        grid: of rank files; has no effect on the other formats.
        dtype: of the weights; None keeps each tensor's.
    """

    to: Format
    grid: RankGrid = ONE_RANK
    dtype: DType | None = None


def plan(source: Catalog, form: Form) -> Target:
    """Lay out the target, and check it whole.

    Raises:
        RequestError: the grid does not go with the model, or the model is of rewards.
        WorkError: a tensor of the source is not all there.
    """
    if SCORE_HEAD in source.weights:
        raise RequestError(
            "reward models are not converted",
            where=str(source.folder),
            rule="a score head has no form that other programs read",
            cure="use the checkpoint as it is, which loads at any layout",
        )
    dtypes = {name: form.dtype or tensor.dtype for name, tensor in source.weights.items()}
    dtypes |= {name: tensor.dtype for name, tensor in source.optimizer_state.items()}
    if form.to == "hf":
        target = plan_hugging_face(source, dtypes)
    elif form.to == "megatron":
        target = plan_megatron(source, dtypes, form.grid)
    else:
        _refuse_state_in_part(source)
        target = plan_distributed(source, dtypes)
    check_plan(source, target)
    return target


def _refuse_state_in_part(source: Catalog) -> None:
    fault = state_fault(source)
    if fault is not None:
        raise WorkError(
            fault,
            where=str(source.folder),
            cure="use another copy of the checkpoint, or take the weights alone: --to hf, and that --to distributed",
        )


def check_plan(source: Catalog, target: Target) -> None:
    """Every tensor of the source is whole and used once; every place of the target is filled once, inside its file.

    Raises:
        WorkError: a tensor of the source is not all there.
        AssertionError: a defect of ours.
    """
    for name, tensor in source.tensors.items():
        fault = cover_fault(tensor)
        if fault is not None:
            raise WorkError(
                f"{name} is not whole: {fault}", where=str(source.folder), cure="use another copy of the checkpoint"
            )
    written = [name for part in target.parts for name in part]
    if len(set(written)) != len(written) or set(written) != set(target.tensors):
        raise AssertionError("a tensor of the target is written twice or never")
    if not set(source.weights) <= set(target.tensors) <= set(source.tensors):
        raise AssertionError("source and target do not hold the same tensors")
    spans: dict[str, list[tuple[int, int]]] = {file.name: [] for file in target.files}
    for file in target.files:
        spans[file.name] += [(start, start + len(data)) for start, data in file.literals]
    for name, tensor in target.tensors.items():
        fault = cover_fault(tensor)
        if fault is not None or tensor.shape != source.tensors[name].shape:
            raise AssertionError(f"{name} is planned wrong: {fault or tensor.shape}")
        for piece in (*tensor.pieces, *tensor.replicas):
            end = piece.offset + piece.rows * piece.columns * tensor.dtype.size
            spans[piece.file].append((piece.offset, end))
    for file in target.files:
        end = 0
        for start, stop in sorted(spans[file.name]):
            if start < end:
                raise AssertionError(f"byte {start} of {file.name} is planned twice")
            end = stop
        if end > file.size:
            raise AssertionError(f"{file.name} is planned with {file.size} bytes, and {end} are written")


def fingerprint(sources: list[Catalog], target: Target) -> str:
    """Of everything that decides what is written: the sources' files by place, size and time, and the plan.

    A copy of a source elsewhere is another one: sizes and times alone can be those of other weights.
    """
    digest = hashlib.sha256()
    for source in sources:
        held = {piece.file for tensor in source.tensors.values() for piece in tensor.pieces}
        beside = {path.name for path in source.folder.iterdir() if path.is_file()}
        for name in sorted(held | beside):
            facts = (source.folder / name).stat()
            digest.update(f"{source.folder.resolve() / name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        digest.update(repr(sorted(source.recorded.items())).encode())
    for file in target.files:
        digest.update(f"{file.name} {file.size}\n".encode())
        for offset, data in file.literals:
            digest.update(f"{offset} ".encode() + data)
    digest.update(repr((target.format, target.parts, sorted(target.texts.items()))).encode())
    for tensor in target.tensors.values():
        digest.update(repr(tensor).encode())
    return digest.hexdigest()
