"""Rotary position embeddings: plain, linear, Llama 3 and YaRN frequencies (Su et al. 2021).

Core's own modules hard-code Llama 3's frequency factors and know positions only as 0..s-1; here any factors and any
positions go. What comes out is what core's attention rotates with.
"""

from __future__ import annotations

import math

import torch

from model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """[head_width / 2], fp32: radians per position of each pair of channels, scaled as the config says."""
    width = config.head_width
    plain = config.rotary_base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, scaling, config.rotary_base)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies cosine and sine by; 1 for the other kinds (arXiv 2309.00071, section 3.4)."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale is None or scaling.mscale_all_dim is None:
        return _mscale(scaling.factor, 1.0)
    return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)


class RotaryAngles:
    """Angles of every position and channel, computed in fp32 whatever the precision of the model.

    No module on purpose: a buffer would be cast to bf16 with the model, and position 8191 has no bf16.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._inverse_frequencies = inverse_frequencies(config).to(device)
        self._consecutive: dict[int, torch.Tensor] = {}

    def consecutive(self, length: int) -> torch.Tensor:
        """[length, 1, 1, head_width]: angles of positions 0..length-1."""
        if length not in self._consecutive:
            positions = torch.arange(length, device=self._inverse_frequencies.device)
            self._consecutive = {length: self.at(positions[None])}
        return self._consecutive[length]

    def at(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[b, s] int64 positions -> [s, b, 1, head_width] angles."""
        angles = position_ids.t()[..., None].float() * self._inverse_frequencies  # [s, b, head_width / 2]
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]


def _llama3(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths stretched by `factor`, short ones kept, a ramp between (Llama 3.1 model card)."""
    assert scaling.original_max_position_embeddings is not None, "RopeScaling validates this"
    rotations = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return plain * kept + plain / scaling.factor * (1 - kept)


def _yarn(plain: torch.Tensor, scaling: RopeScaling, base: float) -> torch.Tensor:
    """Interpolated below `beta_slow` rotations, kept above `beta_fast`, a ramp over channels between."""
    assert scaling.original_max_position_embeddings is not None, "RopeScaling validates this"
    width = 2 * plain.numel()

    def channel_with(rotations: float) -> float:
        length = scaling.original_max_position_embeddings or 0
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(channel_with(scaling.beta_fast)), 0)
    last = min(math.ceil(channel_with(scaling.beta_slow)), width - 1)
    channels = torch.arange(plain.numel(), dtype=torch.float32)
    stretched = ((channels - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)
    return plain / scaling.factor * stretched + plain * (1 - stretched)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
