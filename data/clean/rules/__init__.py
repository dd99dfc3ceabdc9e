"""Rules that keep or remove a document by its text alone, one file for each source."""
