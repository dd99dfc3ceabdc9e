"""What a cleaning is asked to do. Everything here decides which bytes come out; nothing else does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.clean.rules.settings import RuleSettings
from foundation.errors import ConfigError, RequestError

MAX_HASHES = 4096


@dataclass(frozen=True)
class NearSettings:
    """Near duplicates by MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., chapter 3).

    Two documents whose sets of word n-grams have Jaccard similarity J meet in a bucket with probability
    `1 - (1 - J**rows)**bands`. FineWeb takes 14 bands of 8 rows; the default finds a little more at the same precision.
    """

    bands: int = 20
    rows: int = 8
    ngram: int = 5
    """Words in an n-gram."""
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("bands", "rows", "ngram"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}", getattr(self, name), "it counts something: at least 1", "1 or more")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError("--seed", self.seed, "it has 64 bits and no sign: from 0 to 2**64 - 1", "1")
        if self.hashes > MAX_HASHES:
            raise ConfigError(
                "--bands", self.bands, f"bands x rows is {self.hashes}, more than {MAX_HASHES}", "fewer bands or rows"
            )

    @property
    def hashes(self) -> int:
        """Length of a signature."""
        return self.bands * self.rows

    def probability(self, jaccard: float) -> float:
        """That two documents of this similarity share a bucket."""
        return float(1 - (1 - jaccard**self.rows) ** self.bands)


@dataclass(frozen=True)
class ModelSettings:
    """A fastText classifier: keep documents whose best label is one of `labels` with at least `minimum` probability."""

    path: Path
    labels: tuple[str, ...]
    minimum: float
    sha256: str
    """Of the model's file: another model is another request."""

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= 1:
            raise ConfigError("the least probability", self.minimum, "a probability lies between 0 and 1", "0.5")


@dataclass(frozen=True)
class CleanSettings:
    """A whole request but for its sources."""

    text_key: str = "text"
    normalise: bool = True
    rules: RuleSettings | None = field(default_factory=RuleSettings)
    language: ModelSettings | None = None
    quality: ModelSettings | None = None
    exact: bool = False
    """Remove documents whose text was met before."""
    near: NearSettings | None = None
    """Remove near duplicates."""
    shard_bytes: int = 64 << 20
    """Bytes of source that make up a shard, the unit of work and of output files."""

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ConfigError("--shard-mib", self.shard_bytes / (1 << 20), "a shard holds something", "64")

    @property
    def dedup(self) -> bool:
        """Whether documents are compared with each other."""
        return self.exact or self.near is not None

    def to_json(self) -> dict[str, Any]:
        """As it stands in the plan and the manifest."""
        values = dataclasses.asdict(self)
        for name in ("language", "quality"):
            if values[name] is not None:
                values[name]["path"] = str(values[name]["path"])
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


def model_settings(path: Path, labels: Sequence[str], minimum: float) -> ModelSettings:
    """The settings of a model whose file is there.

    Raises:
        RequestError: it is not.
    """
    if not path.is_file():
        raise RequestError(
            f"no fastText model at {path}",
            rule="a model is one file, as fastText's save_model writes it",
            cure="train one with `orthant data classifier`, or name the file of a published one",
        )
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return ModelSettings(path, tuple(labels), minimum, digest)


def fingerprint(values: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
