"""Several layouts over the same ranks, of which one is in force at a time.

Core keeps its process groups in module state. Here each layout's groups are made once, and what core has written down
is put aside and back. A model computes only while its own layout is in force.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, ModuleType, TracebackType
from typing import Any

from megatron.core import parallel_state

from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout

Sizes = tuple[int, ...]


class Grids:
    """The process groups of `layouts`, from `with` to its end. Collective over the world.

    Args:
        layouts: each fills the world; those of equal sizes share their groups.
        seed: as of `ProcessGroups`.
    """

    def __init__(self, layouts: Sequence[ParallelLayout], seed: int) -> None:
        self._layouts = {_sizes(layout): layout for layout in layouts}
        self._seed = seed
        self._without: dict[str, Any] = {}
        self._states: dict[Sizes, dict[str, Any]] = {}

    def __enter__(self) -> Grids:
        self._without = _state()
        for sizes, layout in self._layouts.items():
            ProcessGroups(layout, self._seed).__enter__()
            self._states[sizes] = _state()
            _put(self._without)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _put(self._without)

    @contextmanager
    def use(self, layout: ParallelLayout) -> Iterator[None]:
        """Within the block `layout` is in force, and after it what was before."""
        before = _state()
        _put(self._states[_sizes(layout)])
        try:
            yield
        finally:
            _put(before)


def _sizes(layout: ParallelLayout) -> Sizes:
    return (layout.tp, layout.cp, layout.pp, layout.vpp, layout.ep, layout.dp)


def _state() -> dict[str, Any]:
    """What core has written down; lists are copied, because core adds to them."""
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(parallel_state).items()
        if name.startswith("_")
        and not name.startswith("__")
        and not isinstance(value, FunctionType | ModuleType | type)
    }


def _put(state: dict[str, Any]) -> None:
    for name in _state():
        setattr(parallel_state, name, state.get(name))
