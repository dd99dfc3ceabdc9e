"""The planner: memory and time of a training step predicted from architecture, layout and hardware."""
