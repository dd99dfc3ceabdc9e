"""`orthant generate CHECKPOINT --prompt TEXT`: one rank, whatever layout the checkpoint was written at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint_tools.manifest import MANIFEST, Manifest, read_manifest
from foundation.errors import RequestError
from training.checkpoint.folder import CheckpointFolder

if TYPE_CHECKING:
    from model.decoder import Decoder

SEED = 1234


def generate(path: Path, *, prompt: str, max_new_tokens: int, temperature: float) -> None:
    """Print `prompt` and what the model makes of it, to stdout.

    Raises:
        RequestError: no checkpoint there, or a prompt without a token.
    """
    from data.tokenizer import load_tokenizer
    from parallel.platform import install

    install()
    from model.generation import continue_tokens
    from training.checkpoint.store import TOKENIZER

    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    tokens = [int(token) for token in tokenizer.encode([prompt])[0]]
    if not tokens:
        raise RequestError("the prompt is empty", rule="the model continues at least one token", cure='--prompt "The"')
    decoder = load_on_one_rank(checkpoint, manifest)
    continued = continue_tokens(
        decoder,
        tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        context_length=manifest.model.max_position_embeddings,
        end=manifest.eod_id,
        seed=SEED,
    )
    print(tokenizer.decode(tokens + list(continued)))


def find_checkpoint(path: Path) -> Path:
    """A checkpoint from its own path, that of the run's checkpoints, or that of the run.

    Raises:
        RequestError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        latest = CheckpointFolder(folder).latest()
        if latest is not None:
            return latest
    raise RequestError(
        f"no checkpoint at {path}",
        rule=f"a checkpoint is a folder with a {MANIFEST}; a run's folder holds them under checkpoints/",
        cure="orthant generate RUN, with the run.folder of a training that has saved",
    )


def load_on_one_rank(checkpoint: Path, manifest: Manifest) -> Decoder:
    """The whole model in this process, which becomes a world of one rank."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from model.core_config import core_config
    from model.decoder import build_decoder_chunks
    from model.kernels.provider import choose_kernels
    from parallel.groups import ProcessGroups
    from parallel.layout import ParallelLayout
    from parallel.platform import current_platform
    from training.checkpoint.tensors import read_weights

    platform, layout = current_platform(), ParallelLayout()
    platform.device(0)
    dist.init_process_group(platform.backend, store=HashStore(), rank=0, world_size=1)
    ProcessGroups(layout, SEED).__enter__()  # for the rest of the process
    kernels = choose_kernels(manifest.model.kernels, on_gpu=platform.device_type == "cuda")
    core = core_config(manifest.model, layout, manifest.precision, kernels)
    chunks = build_decoder_chunks(manifest.model, core, layout, manifest.vocab_size, kernels)
    read_weights(chunks, checkpoint)
    return chunks[0]
