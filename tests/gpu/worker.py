"""Run one function of tests.gpu.cases in this process: `python -m tests.gpu.worker FUNCTION ARGUMENTS.json OUT.pt`.

Whoever starts it hides the GPUs (CUDA_VISIBLE_DEVICES="") to have it run on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def side(device: str, function: str, *arguments: Any, timeout: float = 900, **options: Any) -> Any:
    """What `function` returns in a process of its own on `device` ("cuda" or "cpu").

    Raises:
        AssertionError: it failed; with what it said.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder) / "asked.json", Path(folder) / "out.pt"
        asked.write_text(json.dumps([arguments, options]))
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        command = [sys.executable, "-m", "tests.gpu.worker", function, str(asked), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{function} on {device}:\n{done.stderr[-4000:]}"
        return torch.load(out, weights_only=True)


def main() -> None:
    """One world of one rank, one function."""
    from parallel.platform import install

    platform = install()
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from tests.gpu import cases

    platform.device(0)
    dist.init_process_group(platform.backend, store=HashStore(), rank=0, world_size=1)
    arguments, options = json.loads(Path(sys.argv[2]).read_text())
    torch.save(getattr(cases, sys.argv[1])(*arguments, **options), sys.argv[3])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
