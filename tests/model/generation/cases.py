"""What the generation tests run on ranks, and transformers' answers to hold it against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from model.config import ModelConfig
from model.core_config import core_config
from model.decoder import Decoder, build_decoder_chunks
from model.generation.engine import GenerationEngine, host_groups
from model.generation.settings import Completion, Prompt, SamplingSettings
from model.global_tensors import global_slices
from model.kernels.choice import TORCH
from parallel.groups import ProcessGroups
from parallel.layout import ParallelLayout
from tests.training.hugging_face import Tensors, fresh_reference, under_our_names
from tests.training.parity_cases import SMALL, VOCAB_SIZE, layout

CONTEXT = 128
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"window_size": 7}),
    "qwen2": ("Qwen2", {"add_qkv_bias": True, "share_embeddings_and_output_weights": True}),
    "qwen3": ("Qwen3", {"qk_layernorm": True, "kv_channels": 24, "layernorm_epsilon": 1e-6}),
    "mixtral": ("Mixtral", {"num_experts": 4, "moe_router_topk": 2}),
}
LAYOUTS = {
    "one": layout(),
    "tp2": layout(tp=2),
    "tp2_sp": layout(tp=2, sequence_parallel=True),
    "tp4": layout(tp=4),
    "pp2": layout(pp=2),
    "tp2_pp2": layout(tp=2, pp=2),
    "tp2_sp_pp2": layout(tp=2, pp=2, sequence_parallel=True),
    "pp4": layout(pp=4),
}
"""tp4 has more ranks than key heads."""


def built(family: str) -> tuple[ModelConfig, Any]:
    """Our config of a family, and transformers' model of it with drawn weights."""
    name, fields = MODELS[family]
    sizes = SMALL | {"kernels": "torch", "max_position_embeddings": CONTEXT}
    model = ModelConfig.model_validate(sizes | fields)
    return model, fresh_reference(model, name).eval()


def weights_of(reference: Any, model: ModelConfig) -> Tensors:
    return under_our_names({name: one.detach().clone() for name, one in reference.named_parameters()}, model)


def some_prompts(count: int, shortest: int = 1, longest: int = 24, seed: int = 0) -> list[Prompt]:
    """Prompts of unequal lengths, numbered from 0."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).tolist()
    rows = [torch.randint(0, VOCAB_SIZE, (length,), generator=draw).tolist() for length in lengths]
    return [Prompt(number, tuple(row)) for number, row in enumerate(rows)]


@contextmanager
def decoder_on(weights: Tensors, model: ModelConfig, grid: ParallelLayout) -> Iterator[Decoder]:
    """This rank's stage of the model with `weights`."""
    with ProcessGroups(grid, seed=0), torch.no_grad():
        chunks = build_decoder_chunks(model, core_config(model, grid, "fp32", TORCH), grid, VOCAB_SIZE, TORCH)
        for part in global_slices(list(chunks)):
            whole = weights[part.name]
            rows = max(0, min(part.tensor.shape[0], whole.shape[0] - part.offset[0]))
            part.tensor[:rows] = whole[part.index]
            part.tensor[rows:] = 50.0  # what pads the vocabulary must not matter
        yield chunks[0]


def generate_on(
    weights: Tensors,
    model: ModelConfig,
    grid: ParallelLayout,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    group_size: int = 16,
) -> list[Completion]:
    """Completions as this rank got them."""
    with decoder_on(weights, model, grid) as decoder:
        engine = GenerationEngine(decoder, grid, CONTEXT, host_groups(grid))
        return engine.generate(prompts, settings, group_size)


def greedy_by_transformers(reference: Any, prompts: Sequence[Prompt], new_tokens: int) -> list[tuple[int, ...]]:
    """New tokens of each prompt, by transformers' own generate with its cache."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    tokens, mask = torch.zeros((len(prompts), longest), dtype=torch.long), torch.zeros((len(prompts), longest))
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[row, longest - len(prompt.tokens) :] = 1
    with torch.no_grad():
        found = reference.generate(
            tokens, attention_mask=mask.long(), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
    return [tuple(row[longest:].tolist()) for row in found]


def log_probabilities_by_transformers(reference: Any, completion: Completion, temperature: float) -> torch.Tensor:
    """Of a completion's tokens, by one forward pass over prompt and tokens together, without any padding."""
    whole = torch.tensor([[*completion.prompt.tokens, *completion.tokens]])
    with torch.no_grad():
        logits = reference(input_ids=whole).logits[0, len(completion.prompt.tokens) - 1 : -1]
    every = torch.log_softmax(logits.double() / temperature, dim=-1)
    return every.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
