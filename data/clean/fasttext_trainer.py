"""Trains one fastText model, in a process of its own: `python -m data.clean.fasttext_trainer TEXTS MODEL < SETTINGS`.

fastText 0.9.2 with one thread sets only a tenth of a matrix to its first values (facebookresearch/fastText#1061), and
the rest is whatever lay in memory: models differ from run to run, or training ends with "Encountered NaN". glibc clears
what it hands out when MALLOC_PERTURB_ is 255 as a process starts; hence the process. The rest then begins at zero.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from foundation.errors import WorkError

_CLEARED = {"MALLOC_PERTURB_": "255", "GLIBC_TUNABLES": "glibc.malloc.perturb=255"}
_NAN = 3


def train_in_process(texts: Path, model: Path, settings: dict[str, Any]) -> None:
    """Train.

    Args:
        texts: fastText's format, one text a line.
        model: file to write.
        settings: arguments of `fasttext.train_supervised`.

    Raises:
        WorkError: training failed.
    """
    command = [sys.executable, "-m", "data.clean.fasttext_trainer", str(texts), str(model)]
    environment = {**os.environ, **_CLEARED, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        command, input=json.dumps(settings), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == _NAN:
        raise WorkError("training diverged: fastText met a number that is none", cure="a lower --learning-rate")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise WorkError(f"fastText failed: {last[0]}", where=str(texts.parent), cure="free disk space or memory")


def _main() -> int:
    import fasttext

    texts, model = sys.argv[1:]
    try:
        fasttext.train_supervised(input=texts, **json.load(sys.stdin)).save_model(model)
    except RuntimeError as problem:
        print(problem, file=sys.stderr)
        return _NAN if "NaN" in str(problem) else 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
