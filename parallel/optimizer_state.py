"""What a rank's ZeRO-1 optimizer holds of each parameter: a run of its elements, wherever the cut of a bucket falls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterRun:
    """Consecutive elements of one parameter of the model, laid flat.

    Attributes:
        parameter: the model's.
        start: the first element.
        tensors: [elements] fp32, the optimizer's own storage: the master weights as "param", and both moments.
    """

    parameter: torch.nn.Parameter
    start: int
    tensors: dict[str, torch.Tensor]


def parameter_runs(optimizer: Any) -> Iterator[ParameterRun]:
    """Every run that this rank holds, in the same order every time; moments that no step has made yet are zero.

    Core's own "fully_reshardable" form gathers all runs of a stage on one rank, which writes them alone, and in 0.16.1
    cuts parameters out of what was gathered at offsets that count padding which is not there.

    Args:
        optimizer: core's, of which every part is a DistributedOptimizer.
    """
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        for parameter, elements in _elements(part):
            group, place = part.model_param_group_index_map[parameter]
            main = part.optimizer.param_groups[group]["params"][place]
            state = part.optimizer.state[main]
            tensors = {"param": main.detach(), **{name: state[name] for name in MOMENTS}}
            yield ParameterRun(parameter, elements.start, tensors)


def _elements(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """(parameter, range of its elements) of what lies in this rank's share of the buckets."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]
