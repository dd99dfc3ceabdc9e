"""huggingface/picotron, from a checkout, on the ranks of `benchmarks.layouts --picotron`: the one peer that trains
tensor x pipeline x data parallel on a CPU. Its own modules, schedule and optimizer, as its train.py puts them together.

Nothing of it is changed. Its model imports flash_attn, which needs a GPU, for kernels that it does not use on a CPU:
empty names stand there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import reduce
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from benchmarks.peer_llama import their_sizes, under_their_names
from model.config import ModelConfig
from parallel.layout import ParallelLayout
from training.whole_model import WholeTensors

ON_CPU = {"DTYPE": "float32", "DEVICE": "cpu", "FLASH_ATTEN": "0", "CONTEXT_PARALLEL": "0", "LOCAL_RANK": "0"}
"""What its train.py sets for a run in fp32 on a CPU."""
FLASH_ATTENTION = {
    "flash_attn.flash_attn_interface": "flash_attn_func",
    "flash_attn.layers.rotary": "apply_rotary_emb",
    "flash_attn.ops.triton.layer_norm": "layer_norm_fn",
}
PLACES = {
    "model.embed_tokens": "embedding",
    "model.norm": "final_norm",
    "lm_head": "final_proj",
    "model.layers": "decoder_layers",
    "self_attn.o_proj": "attention.out_proj",
    "self_attn": "attention",
}
"""Hugging Face's names and picotron's."""
CUT_BY_ROWS = ("embedding", "final_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
CUT_BY_COLUMNS = ("out_proj", "down_proj")


class Picotron:
    """Its model on this rank.

    Args:
        path: the checkout.
        weights: the whole model's, by our names; the same on every rank. None: those that it draws itself.
    """

    def __init__(
        self,
        path: Path,
        layout: ParallelLayout,
        model: ModelConfig,
        vocab_size: int,
        lr: float,
        weights: WholeTensors | None,
    ) -> None:
        _make_importable(path)
        self._grid = _place_ranks(layout)
        self.network: Any = _network(model, vocab_size, layout)
        if weights is not None:
            _take_weights(self.network, under_their_names(weights, model), layout, self._grid)
        if layout.dp > 1:
            self.network = import_module("picotron.data_parallel.data_parallel").DataParallelBucket(self.network)
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=lr)
        self._stages = layout.pp

    def step(self, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """One optimizer step over micro-batches of (tokens, the ones after them) [b, s]; this rank's loss before it."""
        loader = _Loader(batches)
        self._optimizer.zero_grad()
        if self._stages > 1:
            shape = (*batches[0][0].shape, self._hidden_size)
            schedule = import_module("picotron.pipeline_parallel.pipeline_parallel").train_step_pipeline_1f1b
            loss = schedule(self.network, loader, shape, torch.device("cpu"), torch.float32)
        else:
            loss = self._accumulate(loader)
        self._optimizer.step()
        if hasattr(self.network, "reset"):
            self.network.reset()
        return float(loss)

    @property
    def is_last_stage(self) -> bool:
        """Whether `step` gives a loss here."""
        return bool(self._grid.pp_is_last_stage)

    @property
    def _hidden_size(self) -> int:
        return next(int(weight.numel()) for weight in self.network.parameters() if weight.dim() == 1)

    def _accumulate(self, loader: _Loader) -> float:
        """As its train.py does where there are no stages."""
        total, replicas = 0.0, self._grid.cp_dp_world_size
        for place in range(loader.grad_acc_steps):
            batch = next(loader)
            if replicas > 1:
                self.network.require_backward_grad_sync = place == loader.grad_acc_steps - 1
            logits = self.network(input_ids=batch["input_ids"])
            targets = batch["target_ids"].reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits.view(targets.numel(), -1), targets, reduction="mean")
            (loss / loader.grad_acc_steps).backward()
            total += loss.item() / loader.grad_acc_steps
        return total


class _Loader:
    """Micro-batches as its own loader hands them out."""

    def __init__(self, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.grad_acc_steps, self._batches = len(batches), iter(batches)

    def __next__(self) -> dict[str, torch.Tensor]:
        tokens, targets = next(self._batches)
        return {
            "input_ids": tokens,
            "target_ids": targets.contiguous(),
            "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens),
        }


def _make_importable(path: Path) -> None:
    os.environ.update(ON_CPU)
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    for name, function in FLASH_ATTENTION.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
        setattr(sys.modules[name], function, None)


def _place_ranks(layout: ParallelLayout) -> Any:
    manager = import_module("picotron.process_group_manager")
    manager.setup_process_group_manager(tp_size=layout.tp, cp_size=1, pp_size=layout.pp, dp_size=layout.dp)
    return manager.process_group_manager


def _network(model: ModelConfig, vocab_size: int, layout: ParallelLayout) -> Any:
    config = SimpleNamespace(**their_sizes(model, vocab_size), rope_theta=model.rotary_base)
    network = import_module("picotron.model").Llama(config)
    if layout.tp > 1:
        network = import_module("picotron.tensor_parallel.tensor_parallel").apply_tensor_parallel(network)
    if layout.pp > 1:
        network = import_module("picotron.pipeline_parallel.pipeline_parallel").PipelineParallel(network, config)
    return network.float().train()


@torch.no_grad()
def _take_weights(network: Any, whole: WholeTensors, layout: ParallelLayout, grid: Any) -> None:
    theirs = {_its_name(name): tensor for name, tensor in whole.items()}
    for name, weight in network.named_parameters():
        module = name.split(".")[-2]
        dim = 0 if module in CUT_BY_ROWS else 1 if module in CUT_BY_COLUMNS else None
        part = theirs[name] if dim is None else theirs[name].chunk(layout.tp, dim)[grid.tp_rank]
        weight.copy_(part)


def _its_name(name: str) -> str:
    return reduce(lambda changed, names: changed.replace(*names), PLACES.items(), name)
