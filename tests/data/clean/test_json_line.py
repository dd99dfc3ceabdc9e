"""Another text in a line leaves every other byte alone."""

from __future__ import annotations

import json
import random
import string
from typing import Any

import orjson
import pytest

from data.clean.json_line import with_text


@pytest.mark.parametrize(
    "line",
    [
        '{"id": 12345678901234567890123, "text": "TEXT", "x":1.0, "y":1e5,"z" : -0.10E+3 }',
        '{"text":"TEXT"}',
        ' { "a": {"text": "no", "b": [1, "]}\\"", {}]}, "te\\u0078t" : "TEXT" , "c": [[], "text"] }\r',
        '{"text": "TEXT", "n": null, "text": "TEXT"}',
        '{"k": "\\\\", "text": "TEXT", "t": true, "\\"": "{", "": [{"text": 1}]}',
    ],
)
def test_only_the_text_changes(line: str) -> None:
    raw = line.replace("TEXT", 'old \\n \\\\" }{ \u00e9'.replace('"', '\\"')).encode()
    orjson.loads(raw)
    assert with_text(raw, 'new "\n', "text") == line.replace("TEXT", 'new \\"\\n').encode()


def test_any_object(seed: int = 0) -> None:
    chance = random.Random(seed)

    def value(depth: int) -> Any:
        kind = chance.randrange(5 if depth < 4 else 3)
        if kind == 0:
            return "".join(chance.choice(string.printable + "\u00e9") for _ in range(chance.randrange(9)))
        if kind < 3:
            return chance.choice([None, True, 0, -1.5, 1e300, 10**30])
        if kind == 3:
            return [value(depth + 1) for _ in range(chance.randrange(4))]
        return {value_key(): value(depth + 1) for _ in range(chance.randrange(4))}

    def value_key() -> str:
        return "".join(chance.choice('ab"\\{}[],: \n') for _ in range(chance.randrange(4)))

    for _ in range(500):
        before = {value_key(): value(0) for _ in range(3)} | {"text": str(value(4))} | {value_key(): value(0)}
        line = json.dumps(before, indent=chance.choice([None, None, 1]), ensure_ascii=chance.random() < 0.5).encode()
        assert json.loads(with_text(line, "new", "text")) == before | {"text": "new"}
