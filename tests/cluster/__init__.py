"""A real Slurm cluster on one Linux machine, and the tests that run on it. Needs root; see docs/slurm.md."""
