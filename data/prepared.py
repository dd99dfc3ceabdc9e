"""What a prepared corpus is: token files with their shares, and the tokenizer that wrote them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PreparedData:
    """A corpus ready for training. Plain values, so that ranks get it as JSON."""

    train_prefixes: tuple[str, ...]
    train_weights: tuple[float, ...]
    train_contents: tuple[str, ...]
    """Hash of each token file, of what is in its .bin and .idx."""
    validation_prefixes: tuple[str, ...]
    """Empty where no document is held out."""
    validation_weights: tuple[float, ...]
    validation_contents: tuple[str, ...]
    tokenizer_path: str
    """A tokenizer.json or tokenizer.model."""
    tokenizer_hash: str
    vocab_size: int
    """True vocabulary, not padded."""
    eod_id: int
    eod_token: str
    """`load_tokenizer(Path(tokenizer_path), eod_token)` gives the tokenizer back."""
    index_folder: str
    """Holds epochs of the data order; may be empty."""
    unigram_entropy: float
    """Nats a token over the training blend: a loss below it shows that more than frequencies was learned."""

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PreparedData:
        """The value that to_json wrote."""
        values: dict[str, Any] = json.loads(text)
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)
