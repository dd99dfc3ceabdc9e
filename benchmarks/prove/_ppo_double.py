"""PPO in double arithmetic. What then is still between two layouts is not fp32's rounding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import megatron.core.optimizer as core_optimizer
import torch

from alignment.ppo import links
from model import core_config
from model.kernels import linear
from parallel.layout import ParallelLayout
from tests.alignment.ppo.cases import Game, Played, play
from training import optimizer

SINGLE = torch.float32


def without_zero(grid: ParallelLayout) -> ParallelLayout:
    """The same ranks with whole optimizers: core's sharded one and its fp32 reduction know no double."""
    return replace(grid, zero_stage=0, grad_reduce_in_fp32=False)


def play_in_double(game: Game) -> Played:
    """`play`, with fp64 wherever fp32 is asked for. This process stays so: close its pool."""
    compute_in_double()
    return play(game)


def compute_in_double() -> None:
    """Every `float32` and `.float()` of torch, ours and core's, means fp64 from here on."""
    for name in ("float32", "float"):
        setattr(torch, name, torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]  # core's casts to fp32, too
    torch.set_default_dtype(torch.float64)
    core_config.DTYPES["fp32"] = torch.float64
    links.TYPES[str(torch.float64)] = torch.float64
    vars(linear)["FEWEST_ROWS"] = 1 << 60  # oneDNN's products are of fp32
    vars(optimizer)["clip_grad_by_total_norm_fp32"] = clip
    check_as_written = core_optimizer.OptimizerConfig.__post_init__

    def check(config: Any) -> None:
        """Its fields' defaults name the fp32 that there was when core was imported."""
        vars(torch)["float32"] = SINGLE
        check_as_written(config)
        vars(torch)["float32"] = torch.float64

    core_optimizer.OptimizerConfig.__post_init__ = check


def clip(parameters: Iterable[torch.nn.Parameter], max_norm: float, total_norm: float) -> None:
    """As core's, which takes no double."""
    scale = max_norm / (total_norm + 1e-6)
    for parameter in parameters:
        if scale < 1 and parameter.grad is not None:
            parameter.grad.mul_(scale)
