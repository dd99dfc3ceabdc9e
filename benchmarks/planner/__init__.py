"""Calibration of the planner against published measurements, and the report of its error."""
