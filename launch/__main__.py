"""`python -m launch` is `orthant`."""

import signal

from launch.cli import main

code = main()
# Where one rank of a step has failed, srun sends the others TERM: each keeps the exit code that says why.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
raise SystemExit(code)
