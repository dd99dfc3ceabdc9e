"""The true vocabulary of a run, before it is prepared."""

from __future__ import annotations

from data.tokenizer import load_tokenizer
from foundation.errors import RequestError
from launch.config import RunConfig
from model.presets import DEMO_VOCABULARIES


def vocabulary_of(config: RunConfig) -> int:
    """What the configuration says, or the tokenizer that it names, or what demo models are counted with.

    The tokenizer need not be here: what is planned may run elsewhere.

    Raises:
        RequestError: it does not say.
        ConfigError: the tokenizer is here and is none.
    """
    named = config.model.vocab_size or config.data.tokenizer.vocab_size
    if named is None and config.model.preset is not None:
        named = DEMO_VOCABULARIES.get(config.model.preset)
    tokenizer = config.data.tokenizer
    if named is None and tokenizer.path is not None and tokenizer.path.expanduser().exists():
        named = load_tokenizer(tokenizer.path, tokenizer.eod_token).vocab_size
    if named is None:
        at = f": data.tokenizer.path {tokenizer.path} is not here" if tokenizer.path is not None else ""
        raise RequestError(
            "the size of the vocabulary is not known",
            rule=f"model.vocab_size is not set, and there is no tokenizer to ask{at}",
            cure="model.vocab_size=128256 (or what your tokenizer has)",
        )
    return named
