"""The folder of a run's checkpoints: names, `latest`, what is kept."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from checkpoint_tools.manifest import MANIFEST
from foundation.files import flush_folder, write_text
from training.config import CheckpointConfig

NAME = re.compile(r"step_(\d{8})")
UNFINISHED_SUFFIX = ".unfinished"
REPLACED_SUFFIX = ".replaced"


@dataclass(frozen=True)
class CheckpointFolder:
    """RUN/checkpoints: `step_NNNNNNNN` folders that are whole, `.unfinished` ones that are not, and `latest`.

    Where a step is written once more, after a rollback, its first checkpoint is `.step_NNNNNNNN.replaced` until the new
    one has the name: it is whole too, and a kill in between leaves it under that name alone.
    """

    path: Path

    def of_step(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lies."""
        return self.path / f"step_{step:08d}"

    def unfinished(self, step: int) -> Path:
        """Where it is written before it takes its name."""
        return self.path / f".step_{step:08d}{UNFINISHED_SUFFIX}"

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, newest first."""
        if not self.path.is_dir():
            return []
        names = (NAME.fullmatch(entry.name) for entry in self.path.iterdir() if (entry / MANIFEST).is_file())
        return sorted((int(name.group(1)) for name in names if name), reverse=True)

    def has_saved(self) -> bool:
        """Whether there is a whole checkpoint, under its own name or as one that was being replaced."""
        return bool(self.steps() or self._replaced_ones())

    def restored_steps(self) -> list[int]:
        """`steps`, for who begins to write here: what a kill left of a replacement has its name again."""
        self._restore()
        return self.steps()

    def latest(self) -> Path | None:
        """What `latest` points to, or the newest one where it points nowhere."""
        pointer = self.path / "latest"
        if pointer.is_file():
            named = self.path / pointer.read_text().strip()
            if (named / MANIFEST).is_file():
                return named
        steps = self.steps()
        return self.of_step(steps[0]) if steps else None

    def begin(self, step: int) -> Path:
        """An empty unfinished folder; what an earlier run left unfinished is removed."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._restore()
        for leftover in self.path.glob(f".step_*{UNFINISHED_SUFFIX}"):
            shutil.rmtree(leftover)
        unfinished = self.unfinished(step)
        unfinished.mkdir()
        return unfinished

    def finish(self, step: int) -> Path:
        """Give the unfinished checkpoint its name and point `latest` to it."""
        whole = self.of_step(step)
        replaced = whole.exists()  # the same step once more, after a rollback
        if replaced:
            whole.rename(self._replaced(step))
        self.unfinished(step).rename(whole)
        flush_folder(self.path)
        write_text(self.path / "latest", whole.name + "\n")
        if replaced:
            shutil.rmtree(self._replaced(step))
        return whole

    def set_aside(self, steps: list[int], good: int) -> None:
        """Take their names from damaged checkpoints, after `latest` names the `good` one before them.

        They would count among those that are kept, and stand where the run writes these steps once more.
        """
        write_text(self.path / "latest", self.of_step(good).name + "\n")
        for step in steps:
            aside = self.path / f"damaged_{self.of_step(step).name}"
            if aside.exists():
                shutil.rmtree(aside)
            self.of_step(step).rename(aside)
        flush_folder(self.path)

    def remove_superseded(self, config: CheckpointConfig, saved: int) -> None:
        """Delete what `keep_last` and `keep_every` do not keep of the checkpoints up to the one just saved."""
        older = [step for step in self.steps() if step < saved]
        for step in older[config.keep_last - 1 :]:
            if config.keep_every is None or step % config.keep_every:
                self.of_step(step).rename(self._leftover(step))
                shutil.rmtree(self._leftover(step))

    def _restore(self) -> None:
        """Give back its name to a checkpoint whose replacement has not come to it, and remove one whose has."""
        for replaced in self._replaced_ones():
            whole = self.path / replaced.name.removeprefix(".").removesuffix(REPLACED_SUFFIX)
            if whole.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(whole)
                flush_folder(self.path)

    def _replaced_ones(self) -> list[Path]:
        return list(self.path.glob(f".step_*{REPLACED_SUFFIX}"))

    def _replaced(self, step: int) -> Path:
        return self.path / f".step_{step:08d}{REPLACED_SUFFIX}"

    def _leftover(self, step: int) -> Path:
        """What is removed goes by this name first: half removed, it must not count as whole."""
        return self.path / f".step_{step:08d}.removed{UNFINISHED_SUFFIX}"
