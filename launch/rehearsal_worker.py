"""What `orthant rehearse` starts: `python -m launch.rehearsal_worker JOB.json STAGE ...` prints JSON for each stage."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path


def main() -> int:
    """Rehearse the stages named; a refusal of core's is a result too."""
    from foundation.errors import WorkError
    from launch.checks import check_sizes
    from launch.config import config_from
    from launch.rehearsal import rehearse_stage

    described = json.loads(Path(sys.argv[1]).read_text())
    config = config_from(described["config"])
    layout = check_sizes(config, world_size=described["world_size"])
    for stage in map(int, sys.argv[2:]):
        try:
            found = rehearse_stage(config, layout, described["vocab_size"], stage)
        except WorkError as error:
            print(json.dumps({"found": "Impossible", "what": error.what, "cure": error.cure}), flush=True)
            return error.exit_code
        print(json.dumps({"found": type(found).__name__, **asdict(found)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
