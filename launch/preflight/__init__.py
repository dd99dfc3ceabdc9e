"""The look at every node of a job before the first step."""
