"""Layers that keep a state as Transformer Engine's do under delayed scaling. Imported by rank processes."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from model.kernels.amax_state import read_state
from parallel.groups import ProcessGroups
from tests.training.trainer_cases import Run, train
from training.checkpoint.tensors import read_tensors
from training.state import build_state

HISTORY = 4


@dataclass
class DelayedScaling:
    """In the place of Transformer Engine's."""

    margin: int = 0


DelayedScaling.__module__ = "transformer_engine.common.recipe"


def engine_bytes(layer: int, **more: Any) -> torch.Tensor:
    """As a layer of Transformer Engine 2.11 gives them."""
    module = ModuleType("transformer_engine.common.recipe")
    module.DelayedScaling = DelayedScaling  # type: ignore[attr-defined]
    state = {
        "recipe": DelayedScaling(),
        "scale_fwd": torch.full((3,), 1.0 + layer),
        "amax_history_fwd": torch.full((HISTORY, 3), 10.0 + layer),
        "scale_bwd": torch.full((2,), 2.0 + layer),
        "amax_history_bwd": torch.full((HISTORY, 2), 20.0 + layer),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "shape": (1, 2)},
        **more,
    }
    parents = {name: ModuleType(name) for name in ("transformer_engine", "transformer_engine.common")}
    with patch.dict(sys.modules, parents | {"transformer_engine.common.recipe": module}):
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


class Engine:
    """Gives core's linear layers a state that says which global layer they are of, and keeps what they are handed."""

    def __init__(self) -> None:
        self.handed: dict[int, set[float]] = {}

    def __enter__(self) -> Engine:
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.transformer_layer import TransformerLayer

        build = TransformerLayer.__init__

        def numbered(layer: Any, *args: Any, **options: Any) -> None:
            build(layer, *args, **options)
            for module in layer.modules():
                module.global_layer = layer.layer_number - 1

        def give(module: Any) -> Any:
            return engine_bytes(module.global_layer) if hasattr(module, "global_layer") else None

        def take(module: Any, state: Any) -> None:
            found = read_state(state)
            if hasattr(module, "global_layer"):
                seen = self.handed.setdefault(module.global_layer, set())
                seen.add(-1.0 if found is None else float(found["amax_history_fwd"].mean()))

        self._patches = [patch.object(TransformerLayer, "__init__", numbered)]
        for kind in (ColumnParallelLinear, RowParallelLinear):
            self._patches += [patch.object(kind, "get_extra_state", give), patch.object(kind, "set_extra_state", take)]
        for one in self._patches:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._patches:
            one.stop()


def train_with_engine(run: Run) -> Any:
    with Engine():
        return train(run)


def read_with_engine(run: Run, *, delayed: bool) -> dict[int, set[float]]:
    """What each layer of this rank is handed."""
    sections = run.sections()
    with ProcessGroups(run.layout, 1), Engine() as engine:
        state = build_state(run.model_config(), run.layout, sections.training, sections.optimizer, 99)
        for chunk in state.chunks:
            chunk.config.fp8 = "hybrid" if delayed else None
            chunk.config.fp8_recipe, chunk.config.fp8_amax_history_len = "delayed", HISTORY
        with patch("megatron.core.fp8_utils.get_fp8_recipe", lambda _: None, create=True):
            read_tensors(state, run.folder / "checkpoints/step_00000002")
    return engine.handed
