"""Real text for benchmarks: the documentation in Debian packages, as .jsonl.

    python -m benchmarks.real_text OUT.jsonl [--packages FOLDER] [--megabytes N]

Needs apt-get and dpkg-deb, and the network where FOLDER does not hold the .deb files yet. Nothing of it is shipped.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = (
    "python3.11-doc sqlite3-doc postgresql-doc-15 perl-doc git-doc octave-doc manpages-dev linux-doc-6.1 erlang-doc "
    "openjdk-17-doc qtbase5-doc-html cppreference-doc-en-html rust-doc libboost1.81-doc"
).split()
_SHORTEST, _LONGEST = 400, 200_000  # letters of a document
_BLOCKS = {*"p div li h1 h2 h3 h4 h5 h6 tr br pre dt dd td section table ul ol".split()}
_SKIPPED = {"script", "style", "nav", "head", "footer"}


class _Text(HTMLParser):
    """The visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipping += tag in _SKIPPED
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED and self._skipping:
            self._skipping -= 1
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data)


def text_of(path: Path) -> str:
    """The text of a page or a plain file; empty where it is neither."""
    name = path.name.removesuffix(".gz")
    kind = name.rsplit(".", 1)[-1]
    if kind not in ("html", "htm", "txt", "rst", "pod") and "/man/" not in str(path):
        return ""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", errors="replace")
    if kind in ("html", "htm"):
        page = _Text()
        page.feed(text)
        text = "".join(page.parts)
    text = re.sub(r"[ \t]+", " ", text.replace("\r", "").replace("\f", "\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def documents(folder: Path) -> Iterator[str]:
    """Texts below a folder, none twice, long ones cut."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    seen: set[bytes] = set()
    with ProcessPoolExecutor() as pool:
        for text in pool.map(text_of, paths, chunksize=64):
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if len(text) < _SHORTEST or digest in seen:
                continue
            seen.add(digest)
            for begin in range(0, len(text), _LONGEST):
                yield text[begin : begin + _LONGEST]


def main() -> None:
    """As the module says, with what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, default=Path("packages"))
    parser.add_argument("--megabytes", type=int, default=300, help="of text, at most")
    options = parser.parse_args()
    options.packages.mkdir(parents=True, exist_ok=True)
    written = count = 0
    with open(options.out, "w", encoding="utf-8") as handle:
        for package in PACKAGES:
            if written > options.megabytes * 1_000_000:
                break
            if not list(options.packages.glob(f"{package}_*.deb")):
                subprocess.run(["apt-get", "download", package], cwd=options.packages, check=True)
            before = written
            with tempfile.TemporaryDirectory(dir=options.packages) as folder:
                deb = next(options.packages.glob(f"{package}_*.deb"))
                subprocess.run(["dpkg-deb", "-x", str(deb), folder], check=True)
                for text in documents(Path(folder)):
                    if written > options.megabytes * 1_000_000:
                        break
                    handle.write(json.dumps({"text": text, "source": package}, ensure_ascii=False) + "\n")
                    written += len(text.encode())
                    count += 1
            print(f"{package}: {(written - before) / 1e6:.1f} MB", file=sys.stderr)
    print(f"{count:,} documents, {written / 1e6:.1f} MB of text in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
