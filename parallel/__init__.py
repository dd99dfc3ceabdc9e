"""The parallel grid: layout, process groups, platform and sharded optimizer. Knows no model."""
