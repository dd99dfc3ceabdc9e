"""Generation for benchmarks.gpu: tokens a second with a cache, greedy."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks._gpu_ours import drawn_on_device
from benchmarks.gpu import Case
from launch.config import RunConfig
from model.core_config import core_config
from model.decoder import build_decoder_chunks
from model.generation.engine import GenerationEngine, host_groups
from model.generation.settings import Prompt, SamplingSettings
from model.kernels.provider import kernels_here
from parallel.layout import ParallelLayout

BATCHES = (1, 8, 64)


def generation(case: Case, config: RunConfig) -> dict[str, Any]:
    """A row for each number of prompts; `tokens_per_second` is the largest batch's."""
    model, layout = config.model, ParallelLayout()
    vocabulary = model.vocab_size or 1
    kernels = kernels_here(model)
    chunks = build_decoder_chunks(model, core_config(model, layout, "bf16", kernels), layout, vocabulary, kernels)
    drawn_on_device(chunks)
    engine = GenerationEngine(chunks[0].eval(), layout, model.max_position_embeddings, host_groups(layout))
    prompt, new = case.seq_length // 8, min(128, case.seq_length // 4)
    greedy = SamplingSettings(max_new_tokens=new, temperature=0.0)
    rows = []
    for batch in BATCHES if case.shape != "dry" else BATCHES[:2]:
        draw = torch.Generator().manual_seed(batch)
        words = torch.randint(vocabulary, (batch, prompt), generator=draw).tolist()
        asked = [Prompt(number, tuple(row)) for number, row in enumerate(words)]
        samples = []
        for _ in range(4):
            started = time.perf_counter()
            written = sum(len(one.tokens) for one in engine.generate(asked, greedy, group_size=batch))
            torch.cuda.synchronize()
            samples.append(written / (time.perf_counter() - started))
        rows.append({"batch": batch, "tokens_per_second": statistics.median(samples[1:]), "samples": samples})
    return {
        "kernels": kernels.describe(),
        "prompt_tokens": prompt,
        "new_tokens": new,
        "tokens_per_second": rows[-1]["tokens_per_second"],
        "batches": rows,
    }
