"""`orthant submit`: one run as a Slurm job, checked before it queues."""
