"""Slurm, as a login node shows it."""

from __future__ import annotations

import shutil

from launch.diagnosis.asking import first_line
from launch.diagnosis.finding import Finding


def slurm() -> list[Finding]:
    """The commands of Slurm; needed only where jobs are submitted."""
    found = {name: shutil.which(name) for name in ("sbatch", "srun", "squeue", "sinfo", "scancel")}
    if not any(found.values()):
        return [Finding("Slurm", "Slurm", "note", "not here: train starts its own ranks; submit from a login node")]
    missing = [name for name, path in found.items() if path is None]
    if missing:
        fix = "install slurm-client (Debian, Ubuntu) or slurm (Fedora), or load your site's module"
        return [Finding("Slurm", "Slurm", "missing", f"without {', '.join(missing)}", fix)]
    return [Finding("Slurm", "Slurm", "ok", first_line(["sinfo", "--version"]) or "its commands are here")]
