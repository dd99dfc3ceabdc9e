"""What every package stands on: errors that teach, config sections, whole files. Imports nothing of ours."""
