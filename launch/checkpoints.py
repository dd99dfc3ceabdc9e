"""Where a checkpoint lies, from what a person names."""

from __future__ import annotations

from pathlib import Path

from checkpoint_tools.formats.hugging_face import CONFIG
from checkpoint_tools.manifest import MANIFEST
from foundation.errors import RequestError
from training.checkpoint.folder import CheckpointFolder


def find_checkpoint(path: Path) -> Path:
    """A checkpoint from its own path, that of the run's checkpoints, or that of the run.

    Raises:
        RequestError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        latest = CheckpointFolder(folder).latest()
        if latest is not None:
            return latest
    of_transformers = (path / CONFIG).is_file()
    raise RequestError(
        f"no checkpoint at {path}",
        rule=f"a checkpoint is a folder with a {MANIFEST}; a run's folder holds them under checkpoints/",
        cure=f"this one is transformers': orthant convert {path} DST --to distributed, then DST"
        if of_transformers
        else "the run.folder of a training that has saved",
    )
