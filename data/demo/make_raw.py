"""Make raw/crawl.jsonl: what a crawl brings beside prose, for `orthant data clean` to take out again.

    python data/demo/make_raw.py

Copies and near copies of the corpus' documents, menus, script notices, filler, one phrase over and over, and lines that
hold no document. `kind` says what each is; nothing but the road's last look at the cleaning reads it. The same corpus
gives the same bytes.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
COPIES, NEAR_COPIES, OTHERS = 12, 8, 6
LONGEST = 3000
"""Characters of a document that is copied: the file ships with the project and stays small."""

MENU = "Home\nProducts\nPricing\nBlog\nAbout us\nContact\nSign in\nRegister\nHelp\nLegal\n"
SCRIPT = "Please enable JavaScript to view this page. window.load = function () { start(%d); }\n"
PHRASE = "Subscribe to our weekly letter number %d for more of the best offers. "
FILLER = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt, page %d. "
NO_DOCUMENTS = ('{"text": "cut off in the midd', '["a list", "is no document"]', '{"title": "no text here"}')


def documents() -> list[str]:
    """Short documents of the corpus that cleaning keeps: enough sentences, little that repeats."""
    found: list[str] = []
    for part in sorted((HERE / "corpus").glob("*.jsonl.gz")):
        with gzip.open(part, "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        found += [text for text in texts if 1500 <= len(text) <= LONGEST and text.count(". ") > 10]
    return found


def nearly(text: str) -> str:
    """The same text with a line of a mirror's own and one word changed."""
    head, _, rest = text.partition(" ")
    return f"{head} now {rest}\n\nThis copy was made by a mirror that changes very little."


def main() -> None:
    """Write the file."""
    kept = documents()
    step = len(kept) // (COPIES + NEAR_COPIES)
    chosen = kept[::step]
    rows = [("copy", text) for text in chosen[:COPIES]]
    rows += [("near copy", nearly(text)) for text in chosen[COPIES : COPIES + NEAR_COPIES]]
    for number in range(OTHERS):
        rows += [
            ("menu", MENU * (2 + number)),
            ("script notice", SCRIPT % number * 5),
            ("phrase over and over", PHRASE % number * 40),
            ("filler", FILLER % number * 10),
        ]
    lines = [json.dumps({"text": text, "kind": kind}) for kind, text in rows]
    lines[5:5] = NO_DOCUMENTS
    target = HERE / "raw" / "crawl.jsonl"
    target.parent.mkdir(exist_ok=True)
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{target}: {len(rows)} texts and {len(NO_DOCUMENTS)} lines that are none, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
