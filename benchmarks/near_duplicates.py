"""A corpus with planted near duplicates of known similarity, from a seed.

Texts come from an order-2 Markov chain over the demo corpus, with jumps that keep two texts from sharing passages. Some
texts come again with words deleted, replaced and inserted, cut short, or between other texts. For each such pair the
Jaccard similarity of their sets of 5-word n-grams is written down.

    python -m benchmarks.near_duplicates FOLDER [--documents N] [--words N]     # corpus.jsonl and pairs.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data.sources import demo_folder

JUMP = 0.08
NOVEL = 0.012
REPEATED = 0.1
EDITS: tuple[float | str, ...] = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, "cut", "framed")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*[.,;:]?|[0-9][0-9.,]*")


class Chain:
    """An order-2 Markov chain of words."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.words = [word for text in _demo_texts() for word in _WORD.findall(text)]
        self.next: dict[tuple[str, str], list[str]] = defaultdict(list)
        for first, second, third in zip(self.words, self.words[1:], self.words[2:], strict=False):
            self.next[first, second].append(third)

    def text(self, length: int) -> list[str]:
        """A new text of so many words."""
        chance, words = self.chance, self.words
        at = chance.randrange(len(words) - 1)
        first, second = words[at], words[at + 1]
        found: list[str] = []
        while len(found) < length:
            follows = self.next.get((first, second))
            if follows is None or chance.random() < JUMP:
                at = chance.randrange(len(words) - 1)
                first, second = words[at], words[at + 1]
                found.append(first)
                continue
            third = follows[int(chance.random() * len(follows))]
            found.append(third if chance.random() > NOVEL else self.novel())
            first, second = second, third
        return found

    def novel(self) -> str:
        """A word that occurs nowhere."""
        return "".join(self.chance.choice("bcdfghjklmnprstvwz") + self.chance.choice("aeiou") for _ in range(4))

    def edited(self, words: Sequence[str], edit: float | str) -> list[str]:
        """A text again, changed."""
        chance = self.chance
        if edit == "cut":
            return list(words[: int(len(words) * chance.uniform(0.6, 0.95))])
        if edit == "framed":
            return [*self.text(40), *words, *self.text(40)]
        assert isinstance(edit, float)
        found: list[str] = []
        for word in words:
            draw = chance.random()
            if draw < edit / 3:
                continue
            found.append(self.novel() if draw < 2 * edit / 3 else word)
            if 2 * edit / 3 <= draw < edit:
                found.append(chance.choice(self.words))
        return found


def write_corpus(folder: Path, documents: int, usual_words: int = 360, seed: int = 1) -> None:
    """Write corpus.jsonl, of `id` and `text`, and pairs.jsonl, of `original`, `copy`, `edit` and `jaccard`."""
    chain = Chain(seed)
    chance = chain.chance
    texts: list[tuple[str, str]] = []
    pairs: list[dict[str, object]] = []
    while len(texts) < documents:
        length = int(min(8000, max(usual_words / 6, usual_words * chance.lognormvariate(0, 0.8))))
        words = chain.text(length)
        name = f"d{len(texts)}"
        texts.append((name, " ".join(words)))
        if chance.random() >= REPEATED:
            continue
        for _ in range(1 if chance.random() < 0.8 else 3):
            edit = chance.choice(EDITS)
            copy = chain.edited(words, edit)
            pairs.append(
                {"original": name, "copy": f"d{len(texts)}", "edit": edit, "jaccard": round(jaccard(words, copy), 4)}
            )
            texts.append((f"d{len(texts)}", " ".join(copy)))
    chance.shuffle(texts)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text, "id": name}) + "\n" for name, text in texts)
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(pair) + "\n" for pair in pairs)


def jaccard(first: Sequence[str], second: Sequence[str], size: int = 5) -> float:
    """Similarity of two texts' sets of word n-grams, in lower case and without punctuation."""
    one, other = (_shingles(words, size) for words in (first, second))
    return len(one & other) / max(1, len(one | other))


def _shingles(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    plain = re.findall(r"\w+", " ".join(words).lower())
    return {tuple(plain[at : at + size]) for at in range(len(plain) - size + 1)}


def _demo_texts() -> list[str]:
    texts = []
    for path in sorted(demo_folder().glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return texts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=360)
    asked = parser.parse_args()
    write_corpus(asked.folder, asked.documents, asked.words)
