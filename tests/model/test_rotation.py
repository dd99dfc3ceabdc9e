"""The rotation in few passes against core's own unfused one: values and gradients, bit for bit."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from model.config import ModelConfig
from model.kernels.rotation import rotated, rotated_packed
from model.rotary import RotaryAngles

ANGLES = RotaryAngles(
    ModelConfig(num_layers=1, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4), torch.device("cpu")
)
OTHER_POSITIONS = torch.tensor([[0, 1, 2, 0, 1], [7, 8, 9, 4000, 4001]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angles", [ANGLES.consecutive(5), ANGLES.at(OTHER_POSITIONS)], ids=["consecutive", "any"])
def test_it_is_core_s(angles: torch.Tensor, dtype: torch.dtype) -> None:
    heads = torch.randn(5, 2, 6, 12).to(dtype)[:, :, 1:4].requires_grad_()  # a part of queries, keys and values
    expected, found = _apply_rotary_pos_emb_bshd(heads, angles), rotated(heads, angles)
    assert torch.equal(found, expected)
    grad = torch.randn(found.shape).to(dtype)
    assert torch.equal(torch.autograd.grad(found, heads, grad)[0], torch.autograd.grad(expected, heads, grad)[0])


def test_packed_documents_turn_by_their_own_positions() -> None:
    heads, positions = torch.randn(5, 4, 12), OTHER_POSITIONS[:1]
    found = rotated_packed(heads, torch.tensor([0, 3, 5]), ANGLES.at(positions))
    assert torch.equal(found, _apply_rotary_pos_emb_bshd(heads[:, None], ANGLES.at(positions))[:, 0])


def test_what_it_does_not_do_is_refused() -> None:
    heads = torch.randn(5, 1, 4, 12)
    with pytest.raises(ValueError, match="halves of whole heads"):
        rotated(heads, ANGLES.consecutive(5), interleaved=True)
    with pytest.raises(ValueError, match="halves of whole heads"):
        rotated(heads, ANGLES.consecutive(5)[..., :6])
    with pytest.raises(ValueError, match="for every token"):
        rotated_packed(heads[:, 0], torch.tensor([0, 5]), ANGLES.consecutive(4))
