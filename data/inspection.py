"""What a token file holds, for people and programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data.indexed import IndexedTokens, Tokens
from data.manifest import read_manifest
from data.tokenizer import Tokenizer
from data.views import refuse_other_tokenizer
from foundation.errors import RequestError


def describe_token_file(prefix: Path) -> dict[str, Any]:
    """Facts from the index and, where there is one, the manifest; None for what only a manifest could tell.

    Raises:
        RequestError: the .bin or .idx is missing.
        WorkError: the .idx or the manifest is damaged.
    """
    file, manifest = IndexedTokens(prefix), read_manifest(prefix)
    lengths = file.lengths
    facts: dict[str, Any] = {
        "prefix": str(prefix),
        "documents": file.documents,
        "empty_documents": int((np.diff(file.document_index) == 0).sum()),
        "sequences": len(file),
        "tokens": file.tokens,
        "dtype": np.dtype(file.dtype).name,
        "bin_bytes": file.bin_bytes,
        "shortest_sequence": int(lengths.min()) if len(lengths) else None,
        "mean_sequence": round(float(lengths.mean()), 2) if len(lengths) else None,
        "longest_sequence": int(lengths.max()) if len(lengths) else None,
    }
    told = asdict(manifest) if manifest is not None else {}
    names = ("vocab_size", "eod_id", "tokenizer_hash", "unigram_entropy", "bin_sha256", "idx_sha256", "view_of")
    facts.update({name: told.get(name) for name in names})
    facts["sources"] = [dict(source) for source in told.get("sources", ())]
    return facts


def read_document(prefix: Path, number: int, tokenizer: Tokenizer) -> Tokens:
    """The tokens of a document, its end-of-document token included.

    Args:
        prefix: of the token file.
        number: of the document, from 0.
        tokenizer: that wrote it.

    Raises:
        RequestError: no such document, or another tokenizer.
        WorkError: the .idx or the manifest is damaged.
    """
    file = IndexedTokens(prefix)
    if not 0 <= number < file.documents:
        raise RequestError(
            f"{prefix} has no document {number}",
            rule=f"it holds {file.documents:,} documents, counted from 0",
            cure=f"a number up to {file.documents - 1:,}" if file.documents else "a token file with documents",
        )
    refuse_other_tokenizer(prefix, tokenizer)
    first, last = int(file.document_index[number]), int(file.document_index[number + 1])
    return np.concatenate([np.empty(0, dtype=file.dtype), *(file.read(sequence) for sequence in range(first, last))])
