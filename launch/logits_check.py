"""Run a converted model in our decoder beside transformers, on the same tokens: what `--verify logits` does.

Both models are held whole and in fp32 in this process, one after the other: this check needs the model's memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.catalog import Catalog
from checkpoint_tools.dtypes import FP32, converted
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.rows import CatalogRows, Scratch
from checkpoint_tools.verify import Difference
from foundation.errors import RequestError
from model.config import ModelConfig

BOUND = 1e-4
"""Largest difference of two logits over the largest logit. fp32 differs by some 1e-6; a wrong tensor by tenths."""
SEED = 1234
SEQUENCES, LENGTH = 2, 64


def check_request(source: Path, to: str) -> None:
    """Refuse, before anything is converted, what can't be run beside transformers.

    Raises:
        RequestError: transformers is not here, no side is its folder, or the decoder can't run the family.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise RequestError(
            "--verify logits needs transformers, which is not installed",
            rule="it runs the model beside ours",
            cure="pip install transformers, or --verify checksums",
        ) from error
    catalog = open_checkpoint(source)
    if to != "hf" and catalog.format != "hf":
        raise RequestError(
            f"--verify logits is refused from {catalog.format} to {to}",
            rule="transformers runs a side that is hf",
            cure="--verify checksums",
        )
    _model_of(catalog)


def largest_difference(source: Path, target: Path) -> float:
    """The largest difference of two logits, over the largest logit.

    Raises:
        Difference: it is over the bound.
    """
    one, other = open_checkpoint(source), open_checkpoint(target)
    theirs_from, ours_from = (one, other) if one.format == "hf" else (other, one)
    model = _model_of(ours_from)
    vocabulary = Identity.from_model(model).dimensions.vocab
    shape = (SEQUENCES, min(LENGTH, model.max_position_embeddings))
    tokens = torch.from_numpy(np.random.default_rng(SEED).integers(0, vocabulary, shape))
    theirs = _their_logits(theirs_from.folder, tokens)
    ours = _our_logits(ours_from, model, vocabulary, tokens)
    apart = float((ours - theirs).abs().max() / theirs.abs().max())
    if not apart <= BOUND:
        raise Difference(
            f"logits differ by {apart:.3g} of the largest, and the bound is {BOUND:g}\n  where: {target}\n"
            "  do: report it, with the model's config.json"
        )
    return apart


def _model_of(catalog: Catalog) -> ModelConfig:
    identity: Identity = catalog.identity
    if identity.model is None:
        raise RequestError(
            f"--verify logits is refused for a {identity.architecture.name}",
            rule="the decoder cannot run this family: its weights alone are converted",
            cure="--verify checksums",
        )
    return identity.model


def _their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        logits: torch.Tensor = reference.eval()(input_ids=tokens).logits
    return logits.float()


def _our_logits(catalog: Catalog, model: ModelConfig, vocab_size: int, tokens: torch.Tensor) -> torch.Tensor:
    """[b, s, vocabulary], on one rank."""
    from launch.one_rank import one_rank
    from model.core_config import core_config
    from model.decoder import build_decoder_chunks
    from model.kernels.choice import TORCH
    from parallel.layout import ParallelLayout

    layout = ParallelLayout()
    with one_rank(layout), torch.no_grad():
        core = core_config(model, layout, "fp32", TORCH)
        (decoder,) = build_decoder_chunks(model, core, layout, vocab_size, TORCH)
        load_weights([decoder], catalog)
        logits: torch.Tensor = decoder.eval()(tokens.to(torch.cuda.current_device()))
        return logits[..., :vocab_size].float().cpu()


def load_weights(chunks: list[Any], catalog: Catalog) -> None:
    """Put weights of a checkpoint of any format into decoders of any layout; rows that pad the vocabulary become 0."""
    from model.global_tensors import global_slices

    scratch = Scratch()
    with CatalogRows(catalog) as rows:
        for part in global_slices(chunks):
            tensor = catalog.tensors[part.name]
            part.tensor.zero_()
            count = min(part.tensor.shape[0], tensor.rows - part.offset[0])
            if count <= 0:
                continue
            block = scratch.block(count, tensor.columns, tensor.dtype)
            rows.fill(part.name, part.offset[0], block)
            whole = torch.from_numpy(converted(block, tensor.dtype, FP32)).view(count, *tensor.shape[1:])
            part.tensor[:count].copy_(whole[(slice(None), *part.index[1:])])
