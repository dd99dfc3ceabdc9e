"""Checkpoints without a layout: written whole, verified by hash, loaded at any grid."""
