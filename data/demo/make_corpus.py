"""Make the demo corpus from three of Debian's documentation packages.

    apt-get download sqlite3-doc postgresql-doc-15 python3.11-doc
    for package in *.deb; do dpkg -x "$package" unpacked; done
    python data/demo/make_corpus.py unpacked data/demo/corpus

Takes paragraphs of prose from the HTML pages: no code, tables, menus or fragments. One page becomes one document, a
JSON object `{"text": ..., "source": ...}`. The same packages give the same bytes. Standard library only.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """Where a package keeps its pages, and which of them are no prose of its own."""

    name: str
    folder: str
    left_out: str


PACKAGES = (
    # Left out: change logs, adverts for support, lists of people and books, legal pages, the requirements matrix.
    Package(
        "sqlite3-doc",
        "usr/share/doc/sqlite3",
        r"(releaselog|matrix)/|changes|chronology|copyright|crew|books|support|consortium|sponsor|famous|news|hlr",
    ),
    # Left out: release notes (lists), people, legal pages, indexes.
    Package(
        "postgresql-doc-15",
        "usr/share/doc/postgresql-doc-15/html",
        r"release|legalnotice|acronyms|bookindex|biblio|acknowledgements|contrib-trusted|external|sourcerepo",
    ),
    # Left out: legal pages, indexes, and pages that are lists.
    Package(
        "python3.11-doc",
        "usr/share/doc/python3.11/html",
        r"license|copyright|genindex|modindex|search|contents|about|bugs|changelog|_sources|distutils/",
    ),
)

BYTES_A_PACKAGE = 1_050_000
SHORTEST_PARAGRAPH = 80
SHORTEST_DOCUMENT = 500

_SKIPPED = frozenset({"script", "style", "nav", "pre", "table", "footer", "svg", "form"})
_BLOCKS = frozenset(
    {"p", "div", "li", "dd", "dt", "dl", "ul", "ol", "tr", "td", "th", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote"}
    | {"section", "article", "hr", "body", "center"}
)


class Paragraphs(HTMLParser):
    """Collects the text of <p> elements, closed or not."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._words: list[str] = []
        self._inside = False
        self._skipping = 0
        self._in_link_mark = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        if tag in _SKIPPED:
            self._end()
            self._skipping += 1
        elif tag in _BLOCKS:
            self._end()
            self._inside = tag == "p"
        elif tag == "br":
            self._words.append(" ")
        elif tag == "a":
            self._in_link_mark = any(name == "class" and value == "headerlink" for name, value in attrs)

    def handle_endtag(self, tag: str) -> None:
        """Close an element."""
        if tag in _SKIPPED:
            self._end()
            self._skipping = max(0, self._skipping - 1)
        elif tag in _BLOCKS:
            self._end()
        elif tag == "a":
            self._in_link_mark = False

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        if self._inside and not self._skipping and not self._in_link_mark:
            self._words.append(data)

    def close(self) -> None:
        """The end of the page."""
        super().close()
        self._end()

    def _end(self) -> None:
        text = " ".join("".join(self._words).split())
        if text:
            self.found.append(text)
        self._words, self._inside = [], False


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is whole sentences and mostly words."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return (
        len(paragraph) >= SHORTEST_PARAGRAPH
        and letters >= 0.85 * len(paragraph)
        and paragraph[0].isupper()
        and paragraph[-1] in ".!?"
        and not re.search(r"https?://|[{}<>|\\]|\.html|@", paragraph)
    )


def documents(root: Path, package: Package, seen: set[str]) -> Iterator[tuple[str, str]]:
    """(page, text) of every page with enough prose; a paragraph that stands in several pages is taken once."""
    folder = root / package.folder
    for page in sorted(folder.rglob("*.html")):
        name = page.relative_to(folder).as_posix()
        if re.search(package.left_out, name):
            continue
        parser = Paragraphs()
        parser.feed(page.read_bytes().decode("utf-8"))
        parser.close()
        kept = [text for text in parser.found if is_prose(text) and text not in seen]
        seen.update(kept)
        text = "\n\n".join(dict.fromkeys(kept))
        if len(text) >= SHORTEST_DOCUMENT:
            yield name, text


def write_package(root: Path, package: Package, out: Path, seen: set[str]) -> None:
    """Write one package's part, cut to size by taking pages in the order of a hash of their names."""
    pages = list(documents(root, package, seen))
    pages.sort(key=lambda page: hashlib.sha256(page[0].encode()).digest())
    chosen: list[tuple[str, str]] = []
    size = 0
    for name, text in pages:
        if size + len(text.encode()) <= BYTES_A_PACKAGE:
            chosen.append((name, text))
            size += len(text.encode())
    data = io.BytesIO()
    with gzip.GzipFile(fileobj=data, mode="wb", compresslevel=9, mtime=0, filename="") as stream:
        for name, text in sorted(chosen):
            record = {"text": text, "source": f"{package.name}/{name}"}
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    path = out / f"{package.name}.jsonl.gz"
    path.write_bytes(data.getvalue())
    print(f"{path.name}: {len(chosen)} of {len(pages)} pages, {size:,} bytes of text, {path.stat().st_size:,} on disk")


def main() -> None:
    """Read the arguments and write the three parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("unpacked", type=Path, help="folder that the packages were unpacked into")
    parser.add_argument("out", type=Path, help="folder for the corpus")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for package in PACKAGES:
        write_package(arguments.unpacked, package, arguments.out, seen)


if __name__ == "__main__":
    main()
