"""The random number stream of "cuda" on a machine without one.

Core keeps two streams, the CPU's and the device's, saves and restores both around recomputation and expects that
drawing from one leaves the other alone. On CPU every operator draws from torch's one default generator. An alias
would let `model_parallel_cuda_manual_seed` reseed the CPU's stream; so the device's stream is a state of its own that
is swapped into the default generator while device work runs (`DeviceGenerator.active`), and `torch.get_rng_state`
goes on naming the CPU's stream meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceGenerator:
    """Stands in for `torch.cuda.default_generators[i]`: the stream that device operators draw from."""

    def __init__(self, seed: int = 0) -> None:
        self._drawn_by_operators = torch.default_generator
        self._parked = torch.Generator().manual_seed(seed)
        self._depth = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        """Operators inside the block draw from the device's stream; nests."""
        if self._depth == 0:
            self._swap()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._swap()

    def _swap(self) -> None:
        running = self._drawn_by_operators.get_state()
        self._drawn_by_operators.set_state(self._parked.get_state())
        self._parked.set_state(running)

    @property
    def _device_stream(self) -> torch.Generator:
        return self._drawn_by_operators if self._depth else self._parked

    @property
    def cpu_stream(self) -> torch.Generator:
        """The generator that holds the CPU's stream at this moment."""
        return self._parked if self._depth else self._drawn_by_operators

    def get_state(self) -> torch.Tensor:
        return self._device_stream.get_state()

    def set_state(self, state: torch.Tensor) -> None:
        self._device_stream.set_state(state)

    def manual_seed(self, seed: int) -> DeviceGenerator:
        self._device_stream.manual_seed(int(seed))
        return self

    def initial_seed(self) -> int:
        return self._device_stream.initial_seed()


class DeviceGenerators:
    """Stands in for `torch.cuda.default_generators`: every index names the one device of this process."""

    def __init__(self, generator: DeviceGenerator) -> None:
        self._generator = generator

    def __getitem__(self, index: object) -> DeviceGenerator:
        return self._generator

    def __len__(self) -> int:
        return 1
