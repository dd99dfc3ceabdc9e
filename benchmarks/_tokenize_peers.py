"""What benchmarks/tokenize.py measures beside our command; each runs in a process of its own.

python _tokenize_peers.py hf|sentencepiece|datatrove CORPUS.jsonl TOKENIZER OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

BATCH = 512


def texts(corpus: Path) -> Iterator[str]:
    """Of every line of a .jsonl."""
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def hugging_face(corpus: Path, tokenizer: Path, out: Path) -> None:
    """encode_batch, as its users write it."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(tokenizer))
    end = library.token_to_id("<|endoftext|>")
    documents = texts(corpus)
    with open(f"{out}.bin", "wb") as handle:
        while batch := list(islice(documents, BATCH)):
            for encoding in library.encode_batch(batch, add_special_tokens=False):
                handle.write(np.array([*encoding.ids, end], dtype=np.uint16).tobytes())


def sentencepiece(corpus: Path, tokenizer: Path, out: Path) -> None:
    """Its own library, a list of texts at a time."""
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_file=str(tokenizer))
    end = library.eos_id()
    documents = texts(corpus)
    with open(f"{out}.bin", "wb") as handle:
        while batch := list(islice(documents, BATCH)):
            for ids in library.encode(batch, num_threads=-1):
                handle.write(np.array([*ids, end], dtype=np.uint16).tobytes())


def datatrove(corpus: Path, tokenizer: Path, out: Path) -> None:
    """MegatronDocumentTokenizer in one process, which is its cheapest."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    steps = [
        JsonlReader(str(corpus.parent), glob_pattern=corpus.name),
        MegatronDocumentTokenizer(str(out), tokenizer_name_or_path=str(tokenizer), eos_token="<|endoftext|>"),
    ]
    LocalPipelineExecutor(pipeline=steps, tasks=1, workers=1, logging_dir=f"{out}.logs").run()


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    {"hf": hugging_face, "sentencepiece": sentencepiece, "datatrove": datatrove}[kind](*map(Path, paths))
