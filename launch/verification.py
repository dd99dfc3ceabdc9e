"""Run a layout and one rank on the same seed and data, and compare what they computed.

The launcher's side starts both through `launch.local_ranks`; the ranks' side is `verify_as_rank`. Both read one job
file. One rank runs on the CPU, where fp32 products are fp32 and the order of additions is the only freedom left. So
does the layout, unless GPUs are asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.batches import MicroBatch, collate
from data.samples import DocumentRules, Sample
from foundation.files import write_text
from launch.config import RunConfig, as_values, config_from
from launch.device_environment import set_environment
from launch.local_ranks import run_ranks
from launch.machine import VISIBLE
from launch.shrink import STEPS, VOCABULARY
from launch.terminal import say
from launch.world import World
from model.config import KernelOverrides
from parallel.config import ParallelConfig

if TYPE_CHECKING:
    from parallel.layout import ParallelLayout
    from training.parity import Bounds, ParityRecord

TIMEOUT_SECONDS = 300
END_OF_DOCUMENT = 0
COMPARED = "compared.json"


@dataclass(frozen=True)
class Compared:
    """A quantity that both runs computed; the fields of training.parity.Difference, and the precision.

    Attributes:
        precision: "fp32" or "bf16".
        kind: "loss", "gradient norm", "gradient" or "weight".
        name: which: "step 2", or the parameter's global name.
        relative: the difference, relative to one rank's; infinite where one is not finite.
        bound: what it may be.
    """

    precision: str
    kind: str
    name: str
    relative: float
    bound: float

    @property
    def within(self) -> bool:
        return self.relative <= self.bound


def bounds_for(precision: str, *, same_roundings: bool, on_gpu: bool = False) -> Bounds:
    """What two runs may differ by.

    fp32: the defaults of `Bounds`. On a GPU products may round their factors to TF32, whose mantissa has 11 bits: what
    is said of bf16, with u = 2**-11.

    bf16: a number has 8 bits of mantissa, so every operation rounds by up to u = 2**-8 of its result, and a layout
    that splits matrices or sequences rounds at other places than one rank: partial sums, before they are added.

    - gradients: some roundings for each of the few layers, forward and backward, that add up as a random walk. Seen
      over all families at TP4, TP2 x PP2 x DP2 and others: up to 6 u, in norms, which sum over all tokens. Bound 16 u.
    - weights: Adam divides a gradient by its own size, so rounding in a small one turns into a part of a full step,
      and bf16 copies of fp32 weights that are barely apart may round to neighbours. Seen: 3 u. Bound 6 u.
    - losses: means over tokens, whose roundings cancel. Seen: 0.16 u. Bound u / 2.

    These are wide, because bf16 is: they show a path that only bf16 takes and that goes wrong. What a layout computes
    is held by fp32. With `same_roundings` every bf16 operation of the first step is the same as one rank's, so
    gradients have to agree as in fp32 (1e-5); weights may still round to neighbours, u of themselves, and move losses.
    """
    from training.parity import Bounds

    if precision == "fp32" and not on_gpu:
        return Bounds()
    unit = 2.0**-11 if precision == "fp32" else 2.0**-8
    return Bounds(loss=unit / 2, gradient=1e-5 if same_roundings else 16 * unit, weight=6 * unit)


def rounds_as_one_rank(config: RunConfig, layout: ParallelLayout) -> bool:
    """Whether only batch and layers are split, and no sum over ranks is rounded to bf16.

    A tied embedding on two stages gets its two gradients added in fp32; one rank adds them in bf16.
    """
    tied_apart = config.model.share_embeddings_and_output_weights and layout.pp > 1
    return layout.tp == 1 and layout.cp == 1 and layout.ep == 1 and layout.grad_reduce_in_fp32 and not tied_apart


class UnevenDocuments:
    """Random tokens in documents of random length; every micro-batch counts another share of them in its loss.

    The micro-batches of a step are the same at every data-parallel size. `StepBatches` of training.parity.
    """

    def __init__(self, config: RunConfig) -> None:
        data = config.data
        self._training = config.training
        self._rules = DocumentRules(END_OF_DOCUMENT, data.document_mask, data.reset_position_ids, data.eod_mask_loss)

    def __call__(self, step: int, rank: int, ranks: int) -> Iterator[MicroBatch]:
        size = self._training.micro_batch_size
        for number in range(rank, self._training.global_batch_size // size, ranks):
            draw = np.random.default_rng([self._training.seed, step, number])
            batch = collate([self._sample(draw) for _ in range(size)], self._rules)
            counted = draw.random(batch.loss_mask.shape) < 1 / (1 + number % 4)
            yield replace(batch, loss_mask=batch.loss_mask * counted.astype(np.float32))

    def _sample(self, draw: np.random.Generator) -> Sample:
        length = self._training.seq_length
        tokens = draw.integers(END_OF_DOCUMENT + 1, VOCABULARY, length + 1)
        ends = np.sort(draw.choice(np.arange(1, length - 1), 2, replace=False))
        tokens[ends] = END_OF_DOCUMENT
        return Sample(tokens, np.concatenate([[0], ends + 1]))


def compare_with_one_rank(
    small: RunConfig, layout: ParallelLayout, precisions: Sequence[str], folder: Path, *, on_gpus: bool
) -> list[Compared]:
    """Run one rank on the CPU, then `layout`, in processes of their own, and compare.

    Args:
        small: a configuration that runs in seconds, with vocabulary `VOCABULARY`.
        layout: its layout.
        precisions: those to run in, in this order.
        folder: for job files and records.
        on_gpus: the layout runs on GPUs, by the kernels that `small` names; one rank's are torch's.

    Raises:
        WorkError: a rank failed.
    """
    one_rank = {
        "parallel": ParallelConfig(grad_reduce_in_fp32=layout.grad_reduce_in_fp32),
        "model": small.model.model_copy(update={"kernels": "torch", "kernel_overrides": KernelOverrides()}),
    }
    reference, compared = folder / "one_rank", folder / "layout"
    say(f"one rank, {' and '.join(precisions)}")
    with _environment(OMP_NUM_THREADS="1", **{VISIBLE: ""}):
        _run(small.model_copy(update=one_rank), 1, precisions, reference, None)
    say(f"{layout.world_size} ranks" + (" on GPUs" if on_gpus else ""))
    hidden = {} if on_gpus else {VISIBLE: ""}
    with _environment(OMP_NUM_THREADS="1", **hidden):
        _run(small, layout.world_size, precisions, compared, reference)
    return [Compared(**values) for values in json.loads((compared / COMPARED).read_text())]


def _run(config: RunConfig, ranks: int, precisions: Sequence[str], folder: Path, reference: Path | None) -> None:
    folder.mkdir()
    job = {
        "config": as_values(config),
        "precisions": list(precisions),
        "reference": None if reference is None else str(reference),
    }
    write_text(folder / "job.json", json.dumps(job))
    run_ranks(ranks, "launch.rank", "verify", str(folder / "job.json"), cure="run the command again")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def verify_as_rank(job: Path, world: World) -> None:
    """One rank's part: train some steps in each precision.

    Rank 0 writes beside `job` what came out, or, where the job names a reference, how far from it.
    """
    from parallel.platform import install

    platform = install()  # before the first import of megatron.core
    from parallel.groups import start_distributed
    from parallel.layout import ParallelLayout

    described = json.loads(job.read_text())
    config = config_from(described["config"])
    layout = ParallelLayout.from_config(config.parallel, world.world_size)
    set_environment(layout)
    start_distributed(world.rank, world.world_size, world.local_rank, timeout_seconds=TIMEOUT_SECONDS)
    import torch.distributed as dist

    from training.parity import record_run

    records = {}
    for precision in described["precisions"]:
        sections = config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})
        records[precision] = record_run(config.model, layout, sections, VOCABULARY, UnevenDocuments(config), STEPS)
    if world.rank == 0:
        on_gpu = platform.device_type == "cuda"
        same_roundings = rounds_as_one_rank(config, layout) and not on_gpu
        bounds = {name: bounds_for(name, same_roundings=same_roundings, on_gpu=on_gpu) for name in records}
        _finish(records, job.parent, described["reference"], bounds)
    dist.barrier()
    dist.destroy_process_group()


def _finish(records: dict[str, Any], folder: Path, reference: str | None, bounds: dict[str, Bounds]) -> None:
    from training.parity import differences

    if reference is None:
        for precision, record in records.items():
            _write_record(folder / precision, record)
        return
    found = [
        Compared(precision, difference.kind, difference.name, difference.relative, difference.bound)
        for precision, record in records.items()
        for difference in differences(_read_record(Path(reference) / precision), record, bounds[precision])
    ]
    write_text(folder / COMPARED, json.dumps([asdict(one) for one in found]))


def _write_record(path: Path, record: ParityRecord) -> None:
    from safetensors.torch import save_file

    tensors = {f"gradient/{name}": tensor.contiguous() for name, tensor in record.gradients.items()}
    tensors |= {f"weight/{name}": tensor.contiguous() for name, tensor in record.weights.items()}
    save_file(tensors, path.with_suffix(".safetensors"))
    write_text(path.with_suffix(".json"), json.dumps({"losses": record.losses, "norms": record.gradient_norms}))


def _read_record(path: Path) -> ParityRecord:
    from safetensors.torch import load_file

    from training.parity import ParityRecord

    tensors = load_file(path.with_suffix(".safetensors"))
    scalars: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    named: dict[str, dict[str, Any]] = {"gradient": {}, "weight": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        named[kind][name] = tensor
    return ParityRecord(tuple(scalars["losses"]), tuple(scalars["norms"]), named["gradient"], named["weight"])
