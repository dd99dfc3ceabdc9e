"""Corpora, tokenizers, token files (.bin/.idx), the order of the data and its batches. Knows ranks only as integers."""
