"""Initial weights: each rank draws its slice of one function, whatever the layout."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model import initialization
from model.config import ModelConfig
from model.global_tensors import GlobalSlice
from model.initialization import disturb_vectors, initialize
from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.parity_cases import MODELS, VOCAB_SIZE
from training.config import OptimizerConfig, TrainingConfig

MODEL = SimpleNamespace(num_layers=8, init_method_std=0.05)


def parts(
    shapes: Mapping[str, tuple[int, ...]], cut: Mapping[str, tuple[slice, ...]] | None = None
) -> list[GlobalSlice]:
    """Slices that cover the tensors, or what `cut` says of them."""
    made = []
    for name, shape in shapes.items():
        index = (cut or {}).get(name, tuple(slice(0, size) for size in shape))
        sizes = [part.stop - part.start for part in index]
        offset = tuple(part.start for part in index)
        made.append(GlobalSlice(name, shape, offset, torch.full(sizes, torch.nan), is_main_replica=True))
    return made


def drawn(
    made: list[GlobalSlice], monkeypatch: pytest.MonkeyPatch, vocab_size: int = 90, seed: int = 7
) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(initialization, "global_slices", lambda _: iter(made))
    initialize([], MODEL, vocab_size, seed)  # type: ignore[arg-type]
    return {part.name: part.tensor for part in made}


SHAPES = {
    "embedding.word_embeddings.weight": (96, 40),
    "decoder.layers.0.self_attention.linear_qkv.weight": (80, 40),
    "decoder.layers.1.self_attention.linear_qkv.weight": (80, 40),
    "decoder.layers.0.self_attention.linear_qkv.bias": (80,),
    "decoder.layers.0.self_attention.linear_proj.weight": (40, 40),
    "decoder.layers.0.mlp.linear_fc2.weight": (40, 200),
    "decoder.final_layernorm.weight": (40,),
    "output_layer.weight": (96, 40),
}


def test_slices_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(parts(SHAPES), monkeypatch)
    cut = {
        "embedding.word_embeddings.weight": (slice(80, 96), slice(0, 40)),
        "decoder.layers.1.self_attention.linear_qkv.weight": (slice(13, 40), slice(0, 40)),
        "decoder.layers.0.mlp.linear_fc2.weight": (slice(0, 40), slice(50, 101)),
    }
    for name, tensor in drawn(parts(SHAPES, cut), monkeypatch).items():
        assert torch.equal(tensor, whole[name][cut.get(name, (slice(None),) * tensor.ndim)]), name


def test_norms_biases_and_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(parts(SHAPES), monkeypatch)
    assert (whole["decoder.final_layernorm.weight"] == 1).all()
    assert (whole["decoder.layers.0.self_attention.linear_qkv.bias"] == 0).all()
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert not whole[name][90:].any() and (whole[name][:90].abs().sum(1) > 0).all()


def test_padding_does_not_move_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "output_layer.weight"
    narrow, wide = (drawn(parts({name: (rows, 40)}), monkeypatch)[name] for rows in (90, 128))
    assert torch.equal(narrow, wide[:90])


def test_standard_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {name: (256, 256) for name, shape in SHAPES.items() if len(shape) == 2}
    for name, tensor in drawn(parts(shapes), monkeypatch, vocab_size=256).items():
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = MODEL.init_method_std / (4.0 if residual else 1.0)  # sqrt(2 x 8 layers)
        assert tensor.std().item() == pytest.approx(std, rel=0.015), name  # 65,536 draws: 5 sigma is 1.4 %
        assert abs(tensor.mean().item()) < 5 * std / 256, name
        quantiles = torch.quantile(tensor / std, torch.tensor([0.1587, 0.8413]))
        torch.testing.assert_close(quantiles, torch.tensor([-1.0, 1.0]), rtol=0, atol=0.04)


def test_names_seeds_and_rows_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(parts(SHAPES), monkeypatch)
    first, second = (whole[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"] for layer in (0, 1))
    other = drawn(parts(SHAPES), monkeypatch, seed=8)["decoder.layers.0.self_attention.linear_qkv.weight"]
    for one, two in ((first, second), (first, other), (first[:40], first[40:])):
        correlation = np.corrcoef(one.flatten(), two.flatten())[0, 1]
        assert abs(correlation) < 0.1


def test_disturbed_vectors_differ_and_matrices_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = parts(SHAPES)
    before = {name: tensor.clone() for name, tensor in drawn(made, monkeypatch).items()}
    monkeypatch.setattr(initialization, "global_slices", lambda _: iter(made))
    disturb_vectors([], seed=0)
    for part in made:
        moved = (part.tensor - before[part.name]).std()
        assert (0.05 < moved < 0.2) if len(part.shape) == 1 else torch.equal(part.tensor, before[part.name]), part.name


def initial_weights(model: str, layout: ParallelLayout, seed: int) -> Any:
    from parallel.groups import ProcessGroups
    from training.state import build_state
    from training.whole_model import whole_weights

    training = TrainingConfig(train_steps=1, global_batch_size=8, seq_length=32, seed=seed)
    with ProcessGroups(layout, seed):
        state = build_state(
            ModelConfig.model_validate(MODELS[model]), layout, training, OptimizerConfig(lr=1e-3), VOCAB_SIZE
        )
        return whole_weights(state)


@pytest.mark.parametrize("model", ["llama", "tied_biased"])
def test_the_same_function_at_every_layout(ranks: RankPool, model: str) -> None:
    reference = ranks.run(1, initial_weights, model, ParallelLayout(), 1)[0]
    for sizes in ((2, 1, 1), (4, 1, 1), (2, 2, 1), (1, 2, 2)):
        tp, pp, dp = sizes
        layout = ParallelLayout(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, data_parallel_size=dp)
        other = ranks.run(layout.world_size, initial_weights, model, layout, 1)[0]
        assert reference.keys() == other.keys()
        assert [name for name in reference if not torch.equal(reference[name], other[name])] == []
    another_seed = ranks.run(1, initial_weights, model, ParallelLayout(), 2)[0]
    matrices = [name for name, tensor in reference.items() if tensor.ndim == 2]
    assert not any(torch.equal(reference[name], another_seed[name]) for name in matrices)
