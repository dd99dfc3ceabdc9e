"""What every package stands on: errors that teach, config sections, whole-file writes. Imports nothing of ours, nothing heavy."""
