"""Slurm, as a login node shows it."""

from __future__ import annotations

import os
import shutil

from launch.diagnosis.asking import all_lines, first_line
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
    known = [Finding("Slurm", "Slurm", "ok", first_line(["sinfo", "--version"]) or "its commands are here")]
    inside = os.environ.get("SLURM_JOB_ID")
    if inside is not None:
        known.append(Finding("Slurm", "job", "note", f"this is inside job {inside}: submit from a login node instead"))
    return [*known, *partitions()]


def partitions() -> list[Finding]:
    """What `orthant submit --partition` may name: nodes, GPUs and time limits of each."""
    answer = all_lines(["sinfo", "--noheader", "--format=%P|%a|%D|%G|%l"])
    if answer is None:
        text = "no controller answers sinfo: nothing can be submitted from here"
        return [Finding("Slurm", "slurmctld", "missing", text, "scontrol ping, and ask who keeps it")]
    found = []
    for fields in (line.split("|") for line in answer):
        if len(fields) == 5:
            name, state, nodes, resources, limit = (field.strip() for field in fields)
            resources = "no GPUs" if "gpu" not in resources else resources
            text = f"{state}, {nodes} nodes, {resources}, {limit} at most" + (", the default" if "*" in name else "")
            found.append(Finding("Slurm", f"partition {name.strip('*')}", "ok" if state == "up" else "note", text))
    return found
