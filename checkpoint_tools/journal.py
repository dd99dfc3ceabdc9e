"""The folder in which a conversion grows, and the journal by which an interrupted one goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoint_tools.copying import DonePart
from foundation.errors import RequestError, WorkError
from foundation.files import flush_folder
from foundation.locks import NoLocksError, take

JOURNAL = "journal.jsonl"
LOCK = "lock"
"""Held by the process that is at work in the folder, for as long as it lives."""


class Unfinished:
    """`.NAME.unfinished` beside the target: everything lies in it until it is whole and takes its name.

    The journal's first line says which plan it belongs to; each other one is a part whose bytes lie on the disk.

    Args:
        say: takes lines for people.
    """

    def __init__(self, target: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self.target, self._say = target, say
        self.folder = target.parent / f".{target.name}.unfinished"
        self._journal = self.folder / JOURNAL
        self._lock: int | None = None

    def begin(self, plan: str, *, resume: bool) -> dict[int, DonePart]:
        """Make the folder, or take up the one that is there.

        Args:
            plan: a hash of everything that decides what is written.

        Returns:
            The parts that are done.

        Raises:
            RequestError: an unfinished conversion is there and `resume` is false, it is another one, or another process
                is at work on it.
        """
        if self.folder.exists() and not resume:
            raise RequestError(
                f"an unfinished conversion to {self.target} is there",
                where=str(self.folder),
                rule="it is taken up or removed, not overwritten",
                cure=f"add --resume to go on with it, or remove {self.folder}",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        if not self._journal.exists():
            self.remove_all_but(set())  # of a plan that nobody knows: the target has gaps, which have to be zero
            self._append({"plan": plan})
            flush_folder(self.folder)
            return {}
        lines = self._lines()
        if not lines or lines[0] != {"plan": plan}:
            raise RequestError(
                f"the unfinished conversion to {self.target} is another one",
                where=str(self.folder),
                rule="source, layout, dtype and version are those that it was begun with",
                cure=f"repeat the command it was begun with, or remove {self.folder}",
            )
        try:
            parts = [DonePart(**line) for line in lines[1:]]
        except TypeError as error:
            raise self._damaged() from error
        return {part.number: part for part in parts}

    def _take(self) -> None:
        """Let no other process work here until this one ends or lets go."""
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if take(self._lock, self.folder / LOCK):
                return
        except NoLocksError as none:
            self._say(
                none.warning("no other conversion writes there", "each would remove what the other has just written")
            )
            return
        except OSError:
            self.let_go()
            raise
        self.let_go()
        raise RequestError(
            f"another process is at work on the conversion to {self.target}",
            where=str(self.folder),
            rule="one at a time: each would remove what the other has just written",
            cure="wait for it, or end it and repeat the command with --resume",
        )

    def let_go(self) -> None:
        """Another process may take it up."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _damaged(self) -> WorkError:
        return WorkError(f"{self._journal} is damaged", cure=f"remove {self.folder} and start again")

    def _lines(self) -> list[Any]:
        """All whole lines; one that was cut off by a kill does not count."""
        found: list[Any] = []
        raw = self._journal.read_bytes()
        for line in raw.split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise self._damaged() from error
        if not raw.endswith(b"\n"):
            with self._journal.open("r+b") as handle:
                handle.truncate(raw.rfind(b"\n") + 1)
        return found

    def remove_all_but(self, names: set[str]) -> None:
        """Remove what a kill left of files beside the tensors: they are written anew, and temporary ones for good."""
        for path in self.folder.rglob("*"):
            name = str(path.relative_to(self.folder))
            if not path.is_dir() and name not in (JOURNAL, LOCK) and name not in names:
                path.unlink()

    def done(self, part: DonePart) -> None:
        """Write down that the bytes of `part` lie on the disk."""
        self._append(asdict(part))

    def _append(self, line: dict[str, Any]) -> None:
        with self._journal.open("ab") as handle:
            handle.write(json.dumps(line).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())

    def forget(self) -> None:
        """What was copied is not right: the next run begins anew."""
        self._journal.unlink(missing_ok=True)

    def finish(self) -> None:
        """The target takes its name."""
        for name in (JOURNAL, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        for path in sorted(self.folder.rglob("*")):
            if path.is_dir():
                flush_folder(path)
        flush_folder(self.folder)
        self.folder.rename(self.target)
        flush_folder(self.target.parent)
