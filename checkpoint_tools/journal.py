"""The folder in which a conversion grows, and the journal by which an interrupted one goes on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoint_tools.copying import DonePart
from foundation.errors import RequestError, WorkError
from foundation.files import flush_folder

JOURNAL = "journal.jsonl"


class Unfinished:
    """`.NAME.unfinished` beside the target: everything lies in it until it is whole and takes its name.

    The journal's first line says which plan it belongs to; each other one is a part whose bytes lie on the disk.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.parent / f".{target.name}.unfinished"
        self._journal = self.folder / JOURNAL

    def begin(self, plan: str, *, resume: bool) -> dict[int, DonePart]:
        """Make the folder, or take up the one that is there.

        Args:
            plan: a hash of everything that decides what is written.

        Returns:
            The parts that are done.

        Raises:
            RequestError: an unfinished conversion is there and `resume` is false, or it is another one.
        """
        if self.folder.exists() and not resume:
            raise RequestError(
                f"an unfinished conversion to {self.target} is there",
                where=str(self.folder),
                rule="it is taken up or removed, not overwritten",
                cure=f"add --resume to go on with it, or remove {self.folder}",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._journal.exists():
            self._append({"plan": plan})
            flush_folder(self.folder)
            return {}
        lines = self._lines()
        if not lines or lines[0].get("plan") != plan:
            raise RequestError(
                f"the unfinished conversion to {self.target} is another one",
                where=str(self.folder),
                rule="source, layout, dtype and version are those that it was begun with",
                cure=f"repeat the command it was begun with, or remove {self.folder}",
            )
        parts = [DonePart(**line) for line in lines[1:]]
        return {part.number: part for part in parts}

    def _lines(self) -> list[dict[str, Any]]:
        """All whole lines; one that was cut off by a kill does not count."""
        found: list[dict[str, Any]] = []
        raw = self._journal.read_bytes()
        for line in raw.split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise WorkError(f"{self._journal} is damaged", cure=f"remove {self.folder} and start again") from error
        if not raw.endswith(b"\n"):
            with self._journal.open("r+b") as handle:
                handle.truncate(raw.rfind(b"\n") + 1)
        return found

    def remove_all_but(self, names: set[str]) -> None:
        """Remove what a kill left of files beside the tensors: they are written anew, and temporary ones for good."""
        for path in self.folder.rglob("*"):
            if path.is_file() and path != self._journal and str(path.relative_to(self.folder)) not in names:
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
        self._journal.unlink(missing_ok=True)
        for path in sorted(self.folder.rglob("*")):
            if path.is_dir():
                flush_folder(path)
        flush_folder(self.folder)
        self.folder.rename(self.target)
        flush_folder(self.target.parent)
