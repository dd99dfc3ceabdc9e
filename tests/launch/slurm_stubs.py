"""Commands that answer as Slurm's do, for tests of what asks them."""

from __future__ import annotations

from pathlib import Path

import pytest

PARTITIONS = """\
PartitionName=cpu AllowGroups=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED TotalNodes=2 State=UP
PartitionName=gpu AllowGroups=ALL Default=YES MaxNodes=3 MaxTime=2-00:00:00 TotalNodes=4 State=UP
PartitionName=old AllowGroups=ALL Default=NO MaxNodes=UNLIMITED MaxTime=1:00:00 TotalNodes=1 State=DRAIN
"""
NODES = {
    "cpu": "c1|(null)|64|idle\nc2|(null)|64|idle\n",
    "gpu": "".join(f"n{number}|gpu:h100:4(S:0-1),nic:2|16|{'idle' if number else 'down*'}\n" for number in range(4)),
    "old": "o1|gpu:2|8|drained\n",
}
SBATCH = """
count=$(ls "$STUBS" | grep -c '^submitted')
[[ ${REFUSES_FROM:-99} -gt $count ]] || { echo "sbatch: error: Job violates accounting policy" >&2; exit 1; }
printf '%s\\n' "$@" >"$STUBS/submitted$count"
env >"$STUBS/environment$count"
echo "$((41 + count));here"
"""


def stub_slurm(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put them on the PATH; `sbatch` writes its arguments into stubs/submittedN and numbers jobs from 41."""
    stubs.mkdir()
    for name, text in NODES.items():
        (stubs / f"nodes-{name}").write_text(text)
    (stubs / "partitions").write_text(PARTITIONS)
    sinfo = 'for word; do [[ $word == --partition=* ]] && cat "$STUBS/nodes-${word#*=}"; done; true'
    scancel = 'echo "$@" >"$STUBS/cancelled"'
    commands = {"scontrol": 'cat "$STUBS/partitions"', "sinfo": sinfo, "sbatch": SBATCH, "scancel": scancel}
    commands["squeue"] = '[[ ! -e $STUBS/submitted0 ]] || echo "41|$(tail -1 "$STUBS/submitted0")"'
    for name, text in commands.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:/usr/bin:/bin")
    monkeypatch.setenv("STUBS", str(stubs))
    monkeypatch.setattr("launch.submission.slurm.shutil.which", lambda name: name)
    return stubs
