"""What transformers makes of a converted checkpoint: the likeliest continuation, as text.

python -m scripts.road_transformers FOLDER PROMPT
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 20


def main() -> None:
    """Load, generate, print."""
    folder, prompt = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    made = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    print(tokenizer.decode(made[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
