"""Where documents come from: which files a source named in the configuration stands for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.clean.files import written_beside
from foundation.errors import ConfigError

FileKind = Literal["jsonl", "parquet", "text", "saved_dataset"]

DEMO = "orthant:demo"

_SUFFIXES: tuple[tuple[str, FileKind], ...] = (
    (".jsonl", "jsonl"),
    (".jsonl.gz", "jsonl"),
    (".jsonl.zst", "jsonl"),
    (".parquet", "parquet"),
    (".txt", "text"),
)
READABLE = ".jsonl, .jsonl.gz, .jsonl.zst, .parquet or .txt"


@dataclass(frozen=True)
class SourceFile:
    """A file of documents, or a folder written by `datasets`' save_to_disk."""

    path: Path
    kind: FileKind
    begin: int = 0
    """Of an uncompressed .jsonl: only lines that begin at this byte or after it."""
    end: int | None = None
    """Of an uncompressed .jsonl: only lines that begin before this byte."""

    def parts(self) -> list[Path]:
        """The files whose bytes make up this one."""
        if self.kind != "saved_dataset":
            return [self.path]
        return sorted(part for part in self.path.iterdir() if part.is_file() and not part.name.startswith("."))

    def byte_count(self) -> int:
        """Bytes on disk of what is read."""
        size = sum(part.stat().st_size for part in self.parts())
        return (size if self.end is None else min(self.end, size)) - self.begin


@dataclass(frozen=True)
class Source:
    """What one entry of `data.sources` stands for: files of documents, or a tokenised prefix."""

    name: str
    files: tuple[SourceFile, ...] = ()
    prefix: Path | None = None
    ignored: tuple[Path, ...] = ()
    """What lies in a folder and is not read: files that are no documents by their names, hidden files and folders, and
    links to folders that are read already; but not what `orthant data clean` wrote about the documents beside it."""

    def byte_count(self) -> int:
        """Bytes on disk."""
        if self.prefix is not None:
            return sum(Path(f"{self.prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx"))
        return sum(file.byte_count() for file in self.files)


def demo_folder() -> Path:
    """The corpus that ships with the package."""
    return Path(__file__).resolve().parent / "demo" / "corpus"


def find_source(name: str, *, field: str = "data.sources") -> Source:
    """Resolve one entry.

    Args:
        name: a file, a folder, a tokenised prefix, or `orthant:demo`.
        field: the configuration field or argument to blame.

    Raises:
        ConfigError: nothing is there, or nothing readable.
    """
    try:
        return _find(name, demo_folder() if name == DEMO else Path(name).expanduser(), field)
    except (OSError, RuntimeError) as problem:  # RuntimeError: a home folder that nobody has
        raise ConfigError(
            field, name, f"a name that the system can look up: {problem}", "another name, or permission to read there"
        ) from problem


def _find(name: str, path: Path, field: str) -> Source:
    has_bin, has_idx = (Path(f"{path}{suffix}").is_file() for suffix in (".bin", ".idx"))
    if has_bin and has_idx:
        return Source(name, prefix=path)
    if not path.exists():
        if has_bin or has_idx:
            missing = f"{path}{'.idx' if has_bin else '.bin'}"
            raise ConfigError(
                field,
                name,
                f"a tokenised corpus is a .bin and an .idx; {missing} is missing",
                "write it again with `orthant data tokenize`",
            )
        raise ConfigError(field, name, f"no such file or folder: {path}", _cure_for_missing(path))
    if path.is_dir():
        return _find_in_folder(name, path, field)
    kind = file_kind(path)
    if kind is None:
        if path.suffix in (".bin", ".idx"):
            raise ConfigError(field, name, "a tokenised corpus is named without its ending", str(path.with_suffix("")))
        raise ConfigError(
            field, name, f"the ending of {path.name} is not one that can be read", f"a file that ends in {READABLE}"
        )
    return Source(name, files=(SourceFile(path, kind),))


def file_kind(path: Path) -> FileKind | None:
    """What a file holds, by the end of its name."""
    for suffix, kind in _SUFFIXES:
        if path.name.lower().endswith(suffix):
            return kind
    return None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets`' Dataset.save_to_disk wrote this folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _cure_for_missing(path: Path) -> str:
    beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.75)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    if not path.is_absolute():
        return f"a path that exists; relative ones start from the working folder, {Path.cwd()}"
    return "a path that exists"


def _find_in_folder(name: str, folder: Path, field: str) -> Source:
    if is_saved_dataset(folder):
        return Source(name, files=(SourceFile(folder, "saved_dataset"),))
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in folder.iterdir() if part.is_dir() and is_saved_dataset(part))
        raise ConfigError(
            field,
            name,
            f"holds several splits: {', '.join(splits)}",
            " or ".join(str(folder / split) for split in splits) or "the folder of one split",
        )
    files: list[SourceFile] = []
    ignored: list[Path] = []
    for parent, folders, names in _walk(folder, ignored):
        for saved in [part for part in folders if is_saved_dataset(parent / part)]:
            folders.remove(saved)
            files.append(SourceFile(parent / saved, "saved_dataset"))
        for leaf in names:
            kind = file_kind(parent / leaf)
            if kind is None or leaf.startswith("."):
                if not written_beside(parent / leaf):
                    ignored.append(parent / leaf)
            elif not (parent / leaf).is_file():
                raise ConfigError(
                    field, name, f"{parent / leaf} is no file: a link that leads nowhere, or a pipe", "take it away"
                )
            else:
                files.append(SourceFile(parent / leaf, kind))
    if not files:
        raise ConfigError(
            field, name, f"no file in this folder ends in {READABLE}", "a folder of such files, or one of them"
        )
    files.sort(key=lambda file: file.path.as_posix())
    return Source(name, files=tuple(files), ignored=tuple(ignored))


def _walk(top: Path, ignored: list[Path]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` in order of names, through links, each real folder once; what it leaves out is put on `ignored`.

    Raises:
        OSError: a folder cannot be read.
    """
    real_top = Path(os.path.realpath(top))
    entered = {str(real_top), *map(str, real_top.parents)}  # a link upwards would read everything around it
    for parent, folders, names in os.walk(top, followlinks=True, onerror=_give_up):
        entering = []
        for part in sorted(folders):
            real = os.path.realpath(Path(parent, part))
            if part.startswith(".") or real in entered:
                ignored.append(Path(parent, part))
            else:
                entered.add(real)
                entering.append(part)
        # In place: os.walk then visits these in this order.
        folders[:] = entering
        yield Path(parent), folders, sorted(names)


def _give_up(problem: OSError) -> None:
    raise problem
