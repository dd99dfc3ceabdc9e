"""Continue a sequence of tokens with a decoder that lies whole on one rank.

Plain: every new token runs the model over all before it. Fit for a look at a small model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from model.decoder import Decoder


@torch.no_grad()
def continue_tokens(
    decoder: Decoder,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    context_length: int,
    end: int | None,
    seed: int,
) -> Iterator[int]:
    """Draw tokens one after another until `end` (not given out) or `max_new_tokens`.

    Args:
        decoder: the whole model on one rank.
        prompt: one token or more.
        temperature: logits are divided by it before the softmax; 0 takes the likeliest token.
        context_length: the model sees the last so many tokens.
        end: the token that ends a document; None: none is known.
        seed: of the draws.
    """
    decoder.eval()
    draws = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-context_length:]], device=torch.cuda.current_device())
        logits = decoder(window)[0, -1, : decoder.vocab_size].float().cpu()  # [b, s, width] -> [vocabulary]
        token = _draw(logits, temperature, draws)
        if token == end:
            return
        tokens.append(token)
        yield token


def _draw(logits: torch.Tensor, temperature: float, draws: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=draws))
