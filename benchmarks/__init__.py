"""One script per claim; results/*.json hold what they measured."""
