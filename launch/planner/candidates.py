"""Layouts worth looking at for a model on a number of GPUs, and the settings that make a configuration take one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from foundation.accelerators import Device
from launch.config import RunConfig
from parallel.config import even_split

MICRO_BATCHES = (1, 2, 4, 8)
LARGEST_PIPELINE = 64
LARGEST_TENSOR = 16
LARGEST_CONTEXT = 16
LONG_SEQUENCE = 8192
"""Below so many tokens nobody cuts a sequence."""

MOST_CHUNKS = 8


@dataclass(frozen=True)
class Candidate:
    """One way to spread a run. Sizes as in `ParallelLayout`."""

    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    dp: int
    zero: int
    micro_batch_size: int
    recompute: str
    pipeline_layers: tuple[int, ...] | None

    def describe(self) -> str:
        """For people, on one line."""
        parts = [f"TP{self.tp}", f"PP{self.pp}"]
        parts += [f"{name}{size}" for name, size in (("VPP", self.vpp), ("CP", self.cp), ("EP", self.ep)) if size > 1]
        parts += [f"DP{self.dp}", f"ZeRO-{self.zero}", f"micro-batch {self.micro_batch_size}"]
        if self.recompute != "none":
            parts.append(f"recompute {self.recompute}")
        return " ".join(parts)

    def overrides(self) -> list[str]:
        """What `orthant train` takes behind the configuration's path."""
        layers = "null" if self.pipeline_layers is None else f"[{','.join(map(str, self.pipeline_layers))}]"
        overlapped = str(self.dp > 1).lower()
        gathered = str(self.dp > 1 and self.zero == 1).lower()
        settings = [
            f"parallel.tensor_model_parallel_size={self.tp}",
            f"parallel.pipeline_model_parallel_size={self.pp}",
            f"parallel.virtual_pipeline_model_parallel_size={self.vpp if self.vpp > 1 else 'null'}",
            f"parallel.context_parallel_size={self.cp}",
            f"parallel.expert_model_parallel_size={self.ep}",
            f"parallel.data_parallel_size={self.dp}",
            f"parallel.sequence_parallel={str(self.tp > 1).lower()}",
            f"parallel.zero_stage={self.zero}",
            "parallel.zero_implementation=megatron_fsdp",
            f"parallel.overlap_grad_reduce={overlapped}",
            f"parallel.overlap_param_gather={gathered}",
            "parallel.bucket_size=null",
            f"parallel.pipeline_layers={layers}",
            f"training.micro_batch_size={self.micro_batch_size}",
            f"training.recompute_granularity={self.recompute}",
            "training.recompute_num_layers=1",
        ]
        # Of what else the run asks for, whatever a layout cannot have is switched off.
        settings += ["parallel.tp_comm_overlap=false"] if self.tp == 1 else []
        settings += ["parallel.cuda_graphs=false"] if self.zero > 1 or self.recompute != "none" else []
        return settings


def candidates(config: RunConfig, device: Device, num_gpus: int, per_node: int | None = None) -> Iterator[Candidate]:
    """Every layout that fills `num_gpus` and is not pointless on its face.

    Args:
        per_node: GPUs of a node, which tensor-parallel ranks do not leave; None: of a domain of `device`.
    """
    model, seq = config.model, config.training.seq_length
    largest_context = LARGEST_CONTEXT if seq >= LONG_SEQUENCE else 1
    for tp in _tensor_sizes(num_gpus, device.scale_up, per_node):
        for pp in _divisors(num_gpus // tp if num_gpus % tp == 0 else 0, min(LARGEST_PIPELINE, model.num_layers)):
            for cp in _powers(largest_context):
                if num_gpus % (tp * pp * cp):
                    continue
                dp = num_gpus // (tp * pp * cp)
                for ep in _expert_sizes(model.num_experts, cp * dp):
                    for vpp, layers in _splits(model.num_layers, pp):
                        yield from _options(tp, pp, vpp, cp, ep, dp, layers, config.training.global_batch_size)


def _options(
    tp: int, pp: int, vpp: int, cp: int, ep: int, dp: int, layers: tuple[int, ...] | None, batch: int
) -> Iterator[Candidate]:
    zero_stages = (1, 3) if pp == 1 and ep == 1 and dp * cp > 1 else (1,)
    for zero in zero_stages:
        for micro in MICRO_BATCHES:
            if micro > max(1, batch // dp):
                continue
            for recompute in ("none", "full"):
                yield Candidate(tp, pp, vpp, cp, ep, dp, zero, micro, recompute, layers)


def _splits(num_layers: int, pp: int) -> Iterator[tuple[int, tuple[int, ...] | None]]:
    """(virtual chunks, layers of each stage where they do not divide)."""
    if num_layers % pp:
        yield 1, tuple(even_split(num_layers, pp))
        return
    yield 1, None
    if pp > 1:
        yield from ((chunks, None) for chunks in range(2, MOST_CHUNKS + 1) if num_layers // pp % chunks == 0)


def _expert_sizes(experts: int | None, ranks: int) -> list[int]:
    if experts is None:
        return [1]
    return [size for size in range(1, experts + 1) if experts % size == 0 and ranks % size == 0]


def _tensor_sizes(num_gpus: int, domain: int, per_node: int | None) -> list[int]:
    """Sizes of which a whole number fills a node, so that none is cut by its end: of six GPUs three, but not four."""
    filled = min(num_gpus, domain if per_node is None else per_node)
    powers = _powers(LARGEST_TENSOR)
    return [
        size for size in range(1, LARGEST_TENSOR + 1) if filled % size == 0 and (size in powers or per_node is not None)
    ]


def _powers(largest: int) -> list[int]:
    return [2**power for power in range(largest.bit_length()) if 2**power <= largest]


def _divisors(number: int, largest: int) -> list[int]:
    return [size for size in range(1, largest + 1) if number and number % size == 0]
