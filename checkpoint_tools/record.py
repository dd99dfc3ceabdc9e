"""conversion.json: what a converter wrote down beside the files, in every format.

It keeps what the files themselves cannot hold: the family, config.json as it came, the true vocabulary, and a hash of
every tensor, by which damage is found in formats that have no hashes of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from checkpoint_tools.architectures.identity import Identity
from foundation.errors import WorkError
from foundation.section import Section
from model.config import ModelConfig

RECORD = "conversion.json"


class TensorRecord(Section):
    """One tensor of the whole model."""

    shape: tuple[int, ...]
    dtype: str
    xxh3_128: str
    """Of its bytes, row-major, without rows that pad the vocabulary."""


class ConversionRecord(Section):
    """What was converted, and how."""

    format_version: int = 1
    format: str
    """hf, distributed or megatron: of the files that lie beside it."""
    layout: str | None = None
    """What rank files are cut for."""
    source_format: str
    source: str
    """Name of the folder that was converted."""
    plan: str | None = None
    """Fingerprint of the plan: of the source's files and of everything that was to be written."""
    architecture: str
    hugging_face: dict[str, Any] | None = None
    """config.json as it came."""
    model: ModelConfig | None = None
    """Ours; None for families that the decoder cannot run."""
    vocab_size: int
    step: int = 0
    tokens: int = 0
    orthant: str
    tensors: dict[str, TensorRecord] = Field(default_factory=dict)
    """By canonical name."""

    def identity(self, where: str) -> Identity:
        """Whose weights they are."""
        if self.hugging_face is not None:
            return Identity.from_hugging_face(self.hugging_face, where)
        if self.model is None:
            raise WorkError(f"{where} is damaged: it describes no model", cure="use another copy of the checkpoint")
        return Identity.from_model(self.model)

    def hashes(self) -> dict[str, str]:
        """By canonical name."""
        return {name: tensor.xxh3_128 for name, tensor in self.tensors.items()}


def read_record(folder: Path) -> ConversionRecord | None:
    """The record in `folder`, None where there is none.

    Raises:
        WorkError: it is damaged, or cannot be read.
    """
    path = folder / RECORD
    try:
        return ConversionRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WorkError(f"{path} cannot be read: {error.strerror}", cure="correct its permissions") from error
    except (ValidationError, ValueError) as error:
        raise WorkError(f"{path} is damaged: {error}", cure="use another copy of the checkpoint") from error
