"""Tokens a second of generation with a cache, ours beside transformers', and of two pipeline stages.

Same weights, prompts and greedy tokens; first it is checked that both write the same. Runs alternate (ours, theirs,
ours ...), each on one thread, so that what else the machine does falls on both; each figure is the best of its runs,
and every sample is in the result.

With two stages one group of prompts keeps one stage busy at a time: the bound is the speed of one rank. With as many
groups as stages both work, and the bound is twice that of one rank with a group of that size (two cores are there, and
nothing is lost between them).

    python -m benchmarks.generate [--repeats N] [--only peers|pipeline]

Writes benchmarks/results/generate.json and generate_pipeline.json. Never asserts a time.
"""

from __future__ import annotations

from parallel.platform import install

install()  # before anything that imports megatron-core

import argparse  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from importlib import import_module  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.record import write_result  # noqa: E402
from model.config import ModelConfig  # noqa: E402
from model.core_config import core_config  # noqa: E402
from model.decoder import build_decoder_chunks  # noqa: E402
from model.generation.engine import GenerationEngine, host_groups  # noqa: E402
from model.generation.settings import Prompt, SamplingSettings  # noqa: E402
from model.global_tensors import global_slices  # noqa: E402
from model.initialization import initialize  # noqa: E402
from model.kernels.choice import TORCH  # noqa: E402
from parallel.groups import ProcessGroups  # noqa: E402
from parallel.layout import ParallelLayout  # noqa: E402
from tests.ranks import RankPool  # noqa: E402

MODEL = ModelConfig(
    num_layers=8, hidden_size=384, ffn_hidden_size=1024, num_attention_heads=6, num_query_groups=2,
    max_position_embeddings=256, init_method_std=0.1, kernels="torch",
)  # fmt: skip
VOCAB_SIZE, PROMPT_TOKENS, NEW_TOKENS = 8192, 32, 64
BATCHES = (1, 8, 32)
WAIT = 0.05
SIZES = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "parameters": "19m", "vocab_size": VOCAB_SIZE}
GREEDY = SamplingSettings(max_new_tokens=NEW_TOKENS, temperature=0.0)


def prompts(count: int) -> list[Prompt]:
    """`count` prompts of PROMPT_TOKENS random tokens."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCAB_SIZE, (count, PROMPT_TOKENS), generator=draw).tolist()
    return [Prompt(number, tuple(row)) for number, row in enumerate(rows)]


def engine_of(layout: ParallelLayout) -> GenerationEngine:
    """This rank's engine, initialised the same at every layout; process groups have to be there."""
    chunks = build_decoder_chunks(MODEL, core_config(MODEL, layout, "fp32", TORCH), layout, VOCAB_SIZE, TORCH)
    initialize(chunks, MODEL, VOCAB_SIZE, seed=1)
    return GenerationEngine(chunks[0].eval(), layout, MODEL.max_position_embeddings, host_groups(layout))


def peer_of(engine: GenerationEngine) -> Any:
    """transformers' Llama with the engine's weights."""
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=MODEL.num_layers, hidden_size=MODEL.hidden_size, intermediate_size=MODEL.ffn_hidden_size,
        num_attention_heads=MODEL.num_attention_heads, num_key_value_heads=MODEL.query_groups, vocab_size=VOCAB_SIZE,
        max_position_embeddings=MODEL.max_position_embeddings, rms_norm_eps=MODEL.layernorm_epsilon,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    peer = transformers.LlamaForCausalLM(config).eval()
    ours: dict[str, torch.Tensor] = {}
    for part in global_slices([engine.decoder]):
        ours.setdefault(part.name, torch.empty(part.shape))[part.index] = part.tensor
    theirs = dict(peer.named_parameters())
    width, share = MODEL.head_width, MODEL.num_attention_heads // MODEL.query_groups
    with torch.no_grad():
        theirs["model.embed_tokens.weight"].copy_(ours["embedding.word_embeddings.weight"])
        theirs["lm_head.weight"].copy_(ours["output_layer.weight"][:VOCAB_SIZE])
        for layer in range(MODEL.num_layers):
            here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
            groups = ours[f"{here}self_attention.linear_qkv.weight"].view(MODEL.query_groups, share + 2, width, -1)
            for name, rows in (("q", groups[:, :share]), ("k", groups[:, share]), ("v", groups[:, share + 1])):
                theirs[f"{there}self_attn.{name}_proj.weight"].copy_(rows.reshape(-1, MODEL.hidden_size))
            theirs[f"{there}self_attn.o_proj.weight"].copy_(ours[f"{here}self_attention.linear_proj.weight"])
            gate, up = ours[f"{here}mlp.linear_fc1.weight"].chunk(2)
            theirs[f"{there}mlp.gate_proj.weight"].copy_(gate)
            theirs[f"{there}mlp.up_proj.weight"].copy_(up)
            theirs[f"{there}mlp.down_proj.weight"].copy_(ours[f"{here}mlp.linear_fc2.weight"])
    return peer


def beside_transformers(repeats: int) -> list[dict[str, Any]]:
    """A row for each batch, on one rank."""
    rows = []
    with ProcessGroups(ParallelLayout(), seed=0):
        engine = engine_of(ParallelLayout())
        peer = peer_of(engine)
        for batch in BATCHES:
            asked = prompts(batch)
            tokens = torch.tensor([prompt.tokens for prompt in asked])
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
            samples: dict[str, list[float]] = {"ours": [], "transformers": []}
            for repeat in range(repeats + 1):
                started = time.perf_counter()
                ours = [list(one.tokens) for one in engine.generate(asked, GREEDY, group_size=batch)]
                middle = time.perf_counter()
                with torch.no_grad():
                    theirs = peer.generate(tokens, **options)[:, PROMPT_TOKENS:].tolist()
                ended = time.perf_counter()
                assert ours == theirs, "both have to write the same"
                if repeat:  # the first one warms up
                    samples["ours"].append(batch * NEW_TOKENS / (middle - started))
                    samples["transformers"].append(batch * NEW_TOKENS / (ended - middle))
            rows.append({"batch": batch, "samples": samples} | {name: max(of) for name, of in samples.items()})
    return rows


def speeds(layout: ParallelLayout, groups: int, size: int, flights: tuple[int, ...], repeats: int) -> list[list[float]]:
    """Tokens a second with each number of groups in flight, for `groups` groups of `size` prompts."""
    asked = prompts(groups * size)
    parts = [asked[first : first + size] for first in range(0, len(asked), size)]
    found: list[list[float]] = [[] for _ in flights]
    with ProcessGroups(layout, seed=0):
        engine = engine_of(layout)
        for repeat in range(repeats + 1):
            for place, in_flight in enumerate(flights):
                dist.barrier()
                started = time.perf_counter()
                list(engine.stream(parts, GREEDY, in_flight=in_flight))
                dist.barrier()
                if repeat:
                    found[place].append(len(asked) * NEW_TOKENS / (time.perf_counter() - started))
    return found


def seconds_with_waits(layout: ParallelLayout, flights: tuple[int, ...], wait: float) -> list[float]:
    """Seconds for two groups with each number of them in flight, where every stage also waits `wait` seconds a step.

    Waiting takes no core, so this shows the schedule alone, on a machine that has other work too.
    """
    asked, settings = prompts(8), SamplingSettings(max_new_tokens=16, temperature=0.0)
    found = []
    with ProcessGroups(layout, seed=0):
        engine = engine_of(layout)
        forward: Any = engine.decoder.forward

        def slow(*given: Any, **named: Any) -> Any:
            time.sleep(wait)
            return forward(*given, **named)

        engine.decoder.forward = slow  # type: ignore[method-assign]
        for in_flight in (*flights, *flights):  # the first round warms up
            dist.barrier()
            started = time.perf_counter()
            list(engine.stream([asked[:4], asked[4:]], settings, in_flight=in_flight))
            dist.barrier()
            found.append(time.perf_counter() - started)
    return found[len(flights) :]


def measure_peers(pool: RankPool, on_ranks: Any, repeats: int) -> None:
    """Print and write benchmarks/results/generate.json."""
    rows = pool.run(1, on_ranks.beside_transformers, repeats, timeout=1200)[0]
    print(f"{'batch':>6} {'ours':>10} {'transformers':>13}   tokens/s, one thread")
    for row in rows:
        times = row["ours"] / row["transformers"]
        print(f"{row['batch']:6} {row['ours']:10.0f} {row['transformers']:13.0f}   {times:.2f}x")
    print(write_result("generate", SIZES | {"beside_transformers": rows}), flush=True)


def measure_pipeline(pool: RankPool, on_ranks: Any, repeats: int) -> None:
    """Print and write benchmarks/results/generate_pipeline.json."""
    rows, two = [], ParallelLayout(pipeline_model_parallel_size=2)
    print(f"{'group':>6} {'one rank':>10} {'PP2, 1 group':>13} {'PP2, 2 groups':>14} {'bound':>8}   tokens/s")
    for size in (8, 32):
        one_rank = pool.run(1, on_ranks.speeds, ParallelLayout(), 2, size, (1,), repeats, timeout=1200)[0][0]
        single, both = pool.run(2, on_ranks.speeds, two, 2, size, (1, 2), repeats, timeout=1200)[0]
        row = {
            "group": size,
            "one_rank": max(one_rank),
            "one_group_in_flight": max(single),
            "two_groups_in_flight": max(both),
            "bound": 2 * max(one_rank),
        }
        rows.append(row | {"samples": {"one_rank": one_rank, "one_group": single, "two_groups": both}})
        print(
            f"{row['group']:6} {row['one_rank']:10.0f} {row['one_group_in_flight']:13.0f} "
            f"{row['two_groups_in_flight']:14.0f} {row['bound']:8.0f}",
            flush=True,
        )
    alone, together = pool.run(2, on_ranks.seconds_with_waits, two, (1, 2), WAIT, timeout=600)[0]
    schedule = {"wait": WAIT, "one_group_in_flight": alone, "two_groups_in_flight": together, "bound": alone / 2}
    print(
        f"stages that wait {WAIT} s a step: 1 group {alone:.2f} s, 2 groups {together:.2f} s, bound {alone / 2:.2f} s"
    )
    print(write_result("generate_pipeline", SIZES | {"pipeline": rows, "schedule": schedule}))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("peers", "pipeline"))
    given = parser.parse_args()
    on_ranks: Any = import_module("benchmarks.generate")  # ranks import what they run by this name
    pool = RankPool(Path(tempfile.mkdtemp()))
    try:
        if given.only != "pipeline":
            measure_peers(pool, on_ranks, given.repeats)
        if given.only != "peers":
            measure_pipeline(pool, on_ranks, given.repeats)
    finally:
        pool.close()


if __name__ == "__main__":
    main()
