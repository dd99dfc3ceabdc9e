"""The true vocabulary of a run, before any tokenizer is read."""

from __future__ import annotations

from foundation.errors import RequestError
from launch.config import RunConfig
from model.presets import DEMO_VOCABULARIES


def vocabulary_of(config: RunConfig) -> int:
    """What the configuration says, or what demo models are counted with.

    Raises:
        RequestError: it does not say.
    """
    named = config.model.vocab_size or config.data.tokenizer.vocab_size
    if named is None and config.model.preset is not None:
        named = DEMO_VOCABULARIES.get(config.model.preset)
    if named is None:
        raise RequestError(
            "the size of the vocabulary is not known",
            rule="model.vocab_size is not set, and the tokenizer does not say",
            cure="model.vocab_size=128256 (or what your tokenizer has)",
        )
    return named
