"""`python -m launch` is `orthant`."""

from launch.cli import main

raise SystemExit(main())
