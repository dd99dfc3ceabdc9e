"""Training: the step loop, optimizer and schedule, checkpoints, guards and metrics."""
