"""Mutants of our own source: does a test fail when the code is wrong? `make prove AREA=mutation` runs them."""
