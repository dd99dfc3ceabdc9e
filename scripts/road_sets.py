"""Small sets for the road's fine-tuning, made of the cleaned documents: instructions, preferences, prompts.

    python -m scripts.road_sets CLEAN OUT

A question asks for a sentence on a subject. The answer is a sentence of the documents that names it. What is preferred
is one whole sentence; what is not runs on into other matters and breaks off. A reward model can learn that from a few
hundred pairs, and a policy can learn it from the reward model: that is what these sets are for, and no more.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SHORTEST, LONGEST = 30, 70
"""Characters of a sentence that serves as an answer."""
RUNS_ON = 180
"""Characters of an answer that is not preferred."""
INSTRUCTIONS, PAIRS, PROMPTS = 900, 640, 64
SUBJECT = re.compile(r"\b[a-z]{6,}\b")
QUESTIONS = ("Tell me about {}.", "What about {}?", "Say a word on {}.")


def sentences(clean: Path) -> Iterator[tuple[str, str]]:
    """(a short sentence, what follows it in its document), over all documents."""
    for part in sorted(clean.glob("documents-*.jsonl")):
        for line in part.read_text(encoding="utf-8").splitlines():
            text = " ".join(json.loads(line)["text"].split())
            found = re.split(r"(?<=[a-z]\.) (?=[A-Z])", text)
            for place, sentence in enumerate(found[:-1]):
                if SHORTEST <= len(sentence) <= LONGEST and sentence[0].isupper() and sentence.endswith("."):
                    yield sentence, " ".join(found[place + 1 :])[:RUNS_ON]


def asked(sentence: str, chance: random.Random) -> str:
    """A question that the sentence answers: on its longest word."""
    words = SUBJECT.findall(sentence) or ["this"]
    return chance.choice(QUESTIONS).format(max(words, key=len))


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as .jsonl."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write the three sets."""
    clean, out = Path(sys.argv[1]), Path(sys.argv[2])
    chance = random.Random(0)
    found = list(dict.fromkeys(sentences(clean)))
    chance.shuffle(found)
    wanted = INSTRUCTIONS + PAIRS + PROMPTS
    if len(found) < wanted:
        sys.exit(f"{clean} holds {len(found)} short sentences, and the sets take {wanted}")
    out.mkdir(parents=True, exist_ok=True)
    questions = [{"role": "user", "content": asked(sentence, chance)} for sentence, _ in found]
    rows = list(zip(questions, found, strict=True))
    answers = [
        {"messages": [question, {"role": "assistant", "content": sentence}]}
        for question, (sentence, _) in rows[:INSTRUCTIONS]
    ]
    pairs = [
        {"prompt": [question], "chosen": sentence, "rejected": f"{sentence[:-1]} {rest}"[:RUNS_ON]}
        for question, (sentence, rest) in rows[INSTRUCTIONS : INSTRUCTIONS + PAIRS]
    ]
    prompts = [{"messages": [question]} for question, _ in rows[INSTRUCTIONS + PAIRS : wanted]]
    for name, kind in (("instructions", answers), ("preferences", pairs), ("prompts", prompts)):
        write(out / f"{name}.jsonl", [dict(row) for row in kind])
    print(f"{len(answers)} instructions, {len(pairs)} preferences, {len(prompts)} prompts")


if __name__ == "__main__":
    main()
