"""fastText classifiers (Joulin et al. 2016): training on labelled text, and applying.

fastText itself is no longer maintained; the build in use is pinned, and only calls that work with numpy 2 are made.
"""

from __future__ import annotations

import hashlib
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.clean.fasttext_trainer import train_in_process
from data.clean.normalise import normalise
from foundation.errors import RequestError, WorkError
from foundation.files import whole_file

LABEL = "__label__"
_HELD_OUT = 0.1
_ORDERS = re.compile(r"(?<!\S)(</(?=s>(?!\S))|__(?=label__))")


class Classifier:
    """A trained model.

    Raises:
        WorkError: the file is not the one that was asked for, or no model.
        RequestError: it knows none of the labels that are asked for.
    """

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        if sha256 is not None and file_hash(path) != sha256:
            raise WorkError(f"{path} has changed since the work began", cure="start again with --restart")
        self._path = path
        self._model = _load(path)
        self.labels = sorted(label.removeprefix(LABEL) for label in self._model.get_labels())

    def probability_of(self, labels: Sequence[str], texts: Sequence[str]) -> list[float]:
        """For each text the probability that it has one of some labels."""
        unknown = sorted(set(labels) - set(self.labels))
        if unknown:
            raise RequestError(
                f"{self._path} does not know the label {', '.join(unknown)}",
                rule=f"its labels: {', '.join(self.labels[:20])}{', ...' if len(self.labels) > 20 else ''}",
                cure=f"{self.labels[0]}",
            )
        wanted = {LABEL + label for label in labels}
        if not texts:
            return []
        # Its own softmax: with two labels the second one's probability is not needed.
        names, chances = self._model.predict([one_line(text) for text in texts], k=-1)
        return [
            min(1.0, sum(float(chance) for name, chance in zip(of, by, strict=True) if name in wanted))
            for of, by in zip(names, chances, strict=True)
        ]


def _load(path: Path) -> Any:
    import fasttext

    try:
        return fasttext.load_model(str(path))
    except (ValueError, RuntimeError, MemoryError) as problem:
        raise RequestError(
            f"{path} is no fastText model: {problem}",
            rule="a model is one file, as fastText's save_model writes it",
            cure="train one with `orthant data classifier`",
        ) from problem


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def one_line(text: str) -> str:
    """A text as fastText takes it: it reads line by line, and no word of the text is an order to it."""
    # A NUL parts words too. The word </s> ends the line, and one that begins with __label__ is a label.
    return _ORDERS.sub(r"\1 ", " ".join(text.replace("\0", " ").split()))


@dataclass(frozen=True)
class Training:
    """How a model is trained; fastText's own names. One thread: more would give another model each time."""

    epochs: int = 10
    learning_rate: float = 0.5
    dimensions: int = 32
    word_ngrams: int = 2
    min_count: int = 2
    buckets: int = 200_000
    seed: int = 1

    def arguments(self) -> dict[str, Any]:
        """Those of `fasttext.train_supervised`."""
        return {
            "epoch": self.epochs,
            "lr": self.learning_rate,
            "dim": self.dimensions,
            "wordNgrams": self.word_ngrams,
            "minCount": self.min_count,
            "bucket": self.buckets,
            "seed": self.seed,
            "thread": 1,
            "verbose": 0,
        }


@dataclass(frozen=True)
class Trained:
    """A model and how well it tells the labels apart on texts that it did not see."""

    labels: tuple[str, ...]
    trained_on: int
    held_out: int
    accuracy: float
    auc: dict[str, float]
    """For each label: probability that a text with it gets a higher score than one without."""


def train(texts: Iterable[tuple[str, str]], out: Path, training: Training, report: Callable[[str], None]) -> Trained:
    """Train a classifier and measure it on held-out texts.

    Args:
        texts: label and text. A tenth of the different texts is held out, by their content, so that no text is on both
            sides.
        out: file of the model.
        training: settings.
        report: takes lines for people.

    Raises:
        RequestError: fewer than two labels, or a label without texts on either side.
        WorkError: training failed.
    """
    held_out: list[tuple[str, str]] = []
    counts: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(dir=_parent(out)) as folder:
        lines = Path(folder, "train.txt")
        chosen = []
        for label, text in texts:
            line = one_line(normalise(text))
            if not line:
                continue
            held = hashlib.blake2b(line.encode(), digest_size=8).digest()[0] < 256 * _HELD_OUT
            counts.setdefault(label, [0, 0])[held] += 1
            if held:
                held_out.append((label, line))
            else:
                chosen.append(f"{LABEL}{label} {line}\n")
        _check_counts(counts)
        random.Random(training.seed).shuffle(chosen)  # fastText reads in order: labels in blocks would unlearn
        lines.write_text("".join(chosen), encoding="utf-8")
        report(f"training on {len(chosen):,} texts, {len(held_out):,} held out")
        saved = Path(folder, "model.bin")
        train_in_process(lines, saved, training.arguments())
        with open(saved, "rb") as source, whole_file(out) as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
    return _measure(Classifier(out), held_out, len(chosen))


def _parent(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def _check_counts(counts: dict[str, list[int]]) -> None:
    if len(counts) < 2:
        raise RequestError(
            f"one label only: {', '.join(counts) or 'none'}", rule="a classifier tells labels apart", cure="two labels"
        )
    for label, (kept, held) in sorted(counts.items()):
        if not kept or not held:
            raise RequestError(
                f"the label {label} has {kept + held} texts",
                rule="a tenth of the texts is held out to measure the model, and each label has to be on both sides",
                cure="more texts with that label: 50 at the very least, thousands to be of use",
            )


def _measure(model: Classifier, held_out: Sequence[tuple[str, str]], trained_on: int) -> Trained:
    labels = tuple(sorted({label for label, _ in held_out}))
    scores = np.array([model.probability_of([label], [text for _, text in held_out]) for label in labels])
    right = np.array([labels.index(label) for label, _ in held_out])
    return Trained(
        labels,
        trained_on,
        len(held_out),
        float((scores.argmax(axis=0) == right).mean()),
        {label: area_under_curve(scores[number], right == number) for number, label in enumerate(labels)},
    )


def area_under_curve(scores: Sequence[float] | np.ndarray[Any, Any], positive: np.ndarray[Any, Any]) -> float:
    """Of the receiver operating characteristic: the chance that a positive scores above a negative, ties half.

    Args:
        scores: [texts].
        positive: whether each is. [texts]
    """
    values = np.asarray(scores, dtype=np.float64)
    order = np.sort(values)
    below, upto = np.searchsorted(order, values, "left"), np.searchsorted(order, values, "right")
    ranks = (below + upto + 1) / 2
    mine, others = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - mine * (mine + 1) / 2) / (mine * others))
