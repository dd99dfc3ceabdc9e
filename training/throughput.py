"""Tokens, FLOPs and their share of the hardware's peak."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foundation.accelerators import dense_peak
from model.config import ModelConfig
from model.counts import flops_per_token


@dataclass(frozen=True)
class Throughput:
    """Converts tokens a second into MFU for one model on this machine.

    Attributes:
        causal_flops, full_flops: training FLOPs a token, attention counted over the causal half or over all pairs.
        peak: of all ranks together in dense BF16, None where the hardware is not in the table.
    """

    causal_flops: float
    full_flops: float
    peak: float | None

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int, seq_length: int, world_size: int) -> Throughput:
        """For `world_size` ranks like this one."""
        sized = model.model_copy(update={"vocab_size": vocab_size})
        peak = device_peak()
        return cls(
            causal_flops=flops_per_token(sized, seq_length, "causal"),
            full_flops=flops_per_token(sized, seq_length, "full"),
            peak=None if peak is None else peak * world_size,
        )

    def mfu(self, tokens_per_second: float) -> tuple[float | None, float | None]:
        """Model FLOPs utilisation (Chowdhery et al. 2022) in both conventions, None where the peak is unknown."""
        if self.peak is None:
            return None, None
        return self.causal_flops * tokens_per_second / self.peak, self.full_flops * tokens_per_second / self.peak


def device_peak() -> float | None:
    """Dense BF16 FLOP/s of this rank's device, None where it is not known for sure."""
    return dense_peak(torch.cuda.get_device_name())
