"""Our FusedAdam against torch's own Adam and AdamW, and the shape of its state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from parallel.fused_adam import FusedAdam

SHAPES = ((5, 3), (7,), (2, 2, 2))


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]


def groups(members: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups that differ in every setting that a group may hold."""
    return [
        {"params": members[:1], "lr": 1e-2, "weight_decay": 0.3},
        {"params": members[1:], "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.99), "eps": 1e-5},
    ]


def set_gradients(members: list[torch.nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for member in members:
        member.grad = torch.randn(member.shape, generator=draw).to(member.dtype)


def train(optimizer: Any, members: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(members, step)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_torch(decoupled: bool) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = FusedAdam(groups(ours), adam_w_mode=decoupled)
    peer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups(theirs))
    train(optimizer, ours, range(7))
    train(peer, theirs, range(7))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[mine][moment], peer.state[other][moment], rtol=1e-6, atol=1e-8)


def test_the_two_modes_differ_under_weight_decay() -> None:
    results = []
    for decoupled in (True, False):
        members = parameters()
        train(FusedAdam(groups(members), adam_w_mode=decoupled), members, range(3))
        results.append(members)
    assert not torch.allclose(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # no decay in this group


def test_step_is_kept_in_the_group_and_moments_in_the_parameter() -> None:
    members = parameters()
    optimizer = FusedAdam(groups(members))
    train(optimizer, members, range(3))
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    for member in members:
        assert set(optimizer.state[member]) == {"exp_avg", "exp_avg_sq"}
        for moment in optimizer.state[member].values():
            assert moment.shape == member.shape and moment.dtype == member.dtype


def test_state_dict_round_trip_goes_on_bit_for_bit() -> None:
    unbroken = parameters()
    train(FusedAdam(groups(unbroken)), unbroken, range(6))
    members = parameters()
    optimizer = FusedAdam(groups(members))
    train(optimizer, members, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = FusedAdam(groups(members))
    resumed.load_state_dict(saved)
    train(resumed, members, range(3, 6))
    assert all(torch.equal(mine, other) for mine, other in zip(members, unbroken, strict=True))
    assert [group["step"] for group in resumed.param_groups] == [6, 6]


def test_parameters_of_several_dtypes_and_without_gradient() -> None:
    single, double, idle = parameters()[0], parameters(torch.float64)[1], parameters()[2]
    before = idle.detach().clone()
    optimizer = FusedAdam([single, double, idle], lr=1e-2)
    single.grad, double.grad = torch.ones_like(single), torch.ones_like(double)
    start = single.detach().clone(), double.detach().clone()
    optimizer.step()
    # Adam's first step has the size of the learning rate whatever the gradient.
    torch.testing.assert_close(start[0] - single, torch.full_like(single, 1e-2), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(start[1] - double, torch.full_like(double, 1e-2), rtol=1e-6, atol=1e-9)
    assert torch.equal(idle, before) and idle not in optimizer.state


def test_a_group_without_parameters_and_an_empty_shard_do_nothing() -> None:
    empty = torch.nn.Parameter(torch.empty(0))
    empty.grad = torch.empty(0)
    optimizer = FusedAdam([{"params": [empty]}, {"params": []}])
    optimizer.step()
    assert [group.get("step") for group in optimizer.param_groups] == [1, None]


def test_refuses_a_closure() -> None:
    optimizer = FusedAdam(parameters())
    with pytest.raises(TypeError, match="no closure"):
        optimizer.step(lambda: 0.0)
