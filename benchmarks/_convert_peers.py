"""What a peer does with the same model: load and save it. Run by benchmarks/convert.py, in its own process."""

from __future__ import annotations

import sys


def transformers(source: str, target: str) -> None:
    """from_pretrained and save_pretrained, the usual way to rewrite a checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target)


if __name__ == "__main__":
    {"transformers": transformers}[sys.argv[1]](*sys.argv[2:])
