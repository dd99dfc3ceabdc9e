"""Checkpoints on disk: convert, reshard, inspect, verify, compare. Never needs a GPU."""
