"""What `orthant doctor` looks at: one file a subject, each with functions that return findings."""
