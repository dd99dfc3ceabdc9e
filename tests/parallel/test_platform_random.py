"""The device's random stream is its own: seeding and drawing there leaves the CPU's stream alone."""

from __future__ import annotations

from typing import Any

import torch

from tests.ranks import RankPool

# Imported by rank processes, where the platform is installed; megatron is imported inside the functions.


def seed_model_parallel() -> tuple[bool, bool]:
    """(the CPU's stream stayed, the device's moved)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    cpu, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    model_parallel_cuda_manual_seed(77, force_reset_rng=True)
    return torch.equal(cpu, torch.get_rng_state()), not torch.equal(device, torch.cuda.get_rng_state())


def test_seeding_the_device_leaves_the_cpu_stream_alone(ranks: RankPool) -> None:
    assert ranks.run(1, seed_model_parallel)[0] == (True, True)


def draw_in_forks() -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    cpu, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(4)
        named_inside = torch.equal(cpu, torch.get_rng_state())
    with get_cuda_rng_tracker().fork():
        second = torch.rand(4)
    stayed = torch.equal(cpu, torch.get_rng_state()), torch.equal(device, torch.cuda.get_rng_state())
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    with get_cuda_rng_tracker().fork():
        again = torch.rand(4)
    return {
        "cpu and device streams stayed": stayed,
        "torch.get_rng_state inside": named_inside,
        "goes on": not torch.equal(first, second),
        "repeats after seeding": torch.equal(first, again),
    }


def test_forks_draw_from_a_stream_of_their_own(ranks: RankPool) -> None:
    assert ranks.run(1, draw_in_forks)[0] == {
        "cpu and device streams stayed": (True, True),
        "torch.get_rng_state inside": True,
        "goes on": True,
        "repeats after seeding": True,
    }


def draw_in_nested_blocks() -> dict[str, bool]:
    from parallel.platform import current_platform

    platform = current_platform()
    torch.cuda.manual_seed(3)
    expected = torch.rand(6, generator=torch.Generator().manual_seed(3))
    cpu_expected = torch.rand(2, generator=torch.Generator().manual_seed(9))
    torch.random.manual_seed(9)
    torch.cuda.manual_seed(3)
    with platform.device_rng():
        parts = [torch.rand(2)]
        with platform.device_rng():
            parts.append(torch.rand(2))
        parts.append(torch.rand(2))
        torch.cuda.manual_seed(3)  # while active: what operators draw from is reseeded
        reseeded = torch.rand(6)
    return {
        "one stream through all depths": torch.equal(torch.cat(parts), expected),
        "reseeded while active": torch.equal(reseeded, expected),
        "the cpu goes on where it was": torch.equal(torch.rand(2), cpu_expected),
        "initial seed": torch.cuda.initial_seed() == 3,
    }


def test_the_device_stream_nests(ranks: RankPool) -> None:
    said = ranks.run(1, draw_in_nested_blocks)[0]
    assert all(said.values()), said


def save_and_set_states() -> dict[str, bool]:
    from parallel.platform import current_platform

    platform = current_platform()
    torch.manual_seed(21)
    state = torch.get_rng_state()
    expected = torch.rand(3)
    with platform.device_rng():
        torch.set_rng_state(state)  # names the CPU's stream, not the one in use
        device = torch.cuda.get_rng_state()
        drawn = torch.rand(3)
        torch.cuda.set_rng_state(device)
        again = torch.rand(3)
    generator = torch.cuda.default_generators[0]
    generator.manual_seed(2)
    with platform.device_rng():
        seeded = torch.rand(1)
    return {
        "cpu state set inside counts outside": torch.equal(torch.rand(3), expected),
        "device state repeats": torch.equal(drawn, again),
        "default_generators is the same stream": torch.equal(
            seeded, torch.rand(1, generator=torch.Generator().manual_seed(2))
        ),
    }


def test_states_name_the_stream_that_they_say(ranks: RankPool) -> None:
    said = ranks.run(1, save_and_set_states)[0]
    assert all(said.values()), said


def manual_seed_seeds_both() -> bool:
    torch.manual_seed(4)
    first = torch.rand(1), torch.cuda.get_rng_state()
    torch.manual_seed(4)
    return torch.equal(first[0], torch.rand(1)) and torch.equal(first[1], torch.cuda.get_rng_state())


def test_torch_manual_seed_seeds_the_device_too(ranks: RankPool) -> None:
    assert ranks.run(1, manual_seed_seeds_both)[0]


def raise_inside() -> bool:
    from parallel.platform import current_platform

    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    try:
        with current_platform().device_rng():
            torch.rand(5)
            raise LookupError
    except LookupError:
        return torch.equal(torch.rand(2), expected)


def test_an_error_inside_gives_the_cpu_its_stream_back(ranks: RankPool) -> None:
    assert ranks.run(1, raise_inside)[0]


def recompute_dropout(inside_fork: bool) -> tuple[bool, bool, bool]:
    """(kept and recomputed gradients are equal, dropout dropped something, streams end alike)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    from parallel.platform import current_platform

    parallel_state.initialize_model_parallel()
    weight = torch.randn(16, 16)

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        if not inside_fork:
            return torch.nn.functional.dropout(hidden @ weight, 0.5).tanh()
        with get_cuda_rng_tracker().fork():
            return torch.nn.functional.dropout(hidden @ weight, 0.5).tanh()

    gradients: list[torch.Tensor] = []
    states = []
    for recomputed in (False, True):
        model_parallel_cuda_manual_seed(8, force_reset_rng=True)
        value = torch.linspace(-1, 1, 64).view(4, 16).requires_grad_()
        with current_platform().device_rng():
            first = checkpoint(layer, False, value) if recomputed else layer(value)
            second = checkpoint(layer, False, first) if recomputed else layer(first)
            second.square().sum().backward()
        assert value.grad is not None
        gradients.append(value.grad)
        states.append((torch.cuda.get_rng_state(), get_cuda_rng_tracker().get_states()["model-parallel-rng"]))
    kept, recomputed_gradient = gradients
    alike = all(torch.equal(first, second) for first, second in zip(*states, strict=True))
    return torch.equal(kept, recomputed_gradient), bool((layer(value.detach()) == 0).any()), alike


def test_recomputation_repeats_dropout(ranks: RankPool) -> None:
    assert ranks.run(1, recompute_dropout, inside_fork=False)[0] == (True, True, True)
    assert ranks.run(1, recompute_dropout, inside_fork=True)[0] == (True, True, True)
