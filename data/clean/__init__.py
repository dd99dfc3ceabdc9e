"""Cleaning a corpus: normalisation, quality rules, fastText models, exact and near-duplicate removal, and a report."""
