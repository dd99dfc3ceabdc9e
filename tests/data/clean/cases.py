"""Small corpora for cleaning, with known duplicates and known dirt."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.clean.pipeline import clean
from data.clean.report import Summary
from data.clean.settings import CleanSettings
from data.sources import find_source

CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def word(chance: random.Random) -> str:
    return "".join(chance.choice(CONSONANTS) + chance.choice(VOWELS) for _ in range(chance.randint(1, 4)))


def text(chance: random.Random, words: int = 120) -> str:
    """Words without any order: two texts share no n-gram."""
    return " ".join(word(chance) for _ in range(words))


def edited(chance: random.Random, original: str, changes: int = 2) -> str:
    words = original.split()
    for _ in range(changes):
        words[chance.randrange(len(words))] = word(chance)
    return " ".join(words)


def planted(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Documents of which every tenth comes again, changed a little, and every 25th comes again as it was."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        original = text(chance)
        found.append({"id": f"{number}", "text": original, "more": {"kept": [1, None]}})
        if number % 10 == 0:
            found.append({"id": f"{number}-near", "text": edited(chance, original)})
        if number % 25 == 0:
            found.append({"id": f"{number}-same", "text": original})
    chance.shuffle(found)
    return found


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """A .jsonl of JSON values, or of bytes as they are; compressed by its ending."""
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    data = b"".join(line + b"\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def run(source: Path, out: Path, settings: CleanSettings, **options: Any) -> Summary:
    """Clean one source to its end."""
    summary = clean([find_source(str(source))], settings, out, **options)
    assert summary is not None
    return summary


def result(out: Path) -> dict[str, bytes]:
    """Every file of a result."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def documents(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("documents-*.jsonl")) for line in path.open("rb")]


def removed(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("removed/*.ndjson")) for line in path.open("rb")]
