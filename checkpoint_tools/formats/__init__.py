"""The three forms of a checkpoint on disk, each read into a catalog and planned as one. None needs torch."""
