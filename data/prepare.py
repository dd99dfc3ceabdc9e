"""From raw sources to token files, once: trains or loads the tokenizer, tokenises, holds documents out, and remembers.

A folder of prepared data holds one sub-folder for each state of the sources and the tokenizer, named by their content.
A run whose sources and tokenizer are as they were finds its token files there; any change leads to another sub-folder,
so nothing stale is ever served and a run that still reads the old one is not disturbed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.config import DataConfig, SourceEntry, TokenizerConfig, check_files
from data.documents import Reading
from data.enough import check_prepared
from data.fingerprints import ContentHashes, combined, token_file_content
from data.indexed import IndexedTokens, bin_path, entropy, idx_path
from data.manifest import Manifest, read_manifest
from data.prepared import PreparedData
from data.sources import Source, find_source
from data.tokenize import Progress, Report, Tokenization, tokenize
from data.tokenizer import FILE_NAMES, Tokenizer, load_tokenizer, tokenizer_files
from data.views import refuse_other_tokenizer, split_by_content, token_counts
from foundation.errors import WorkError
from foundation.files import write_text
from foundation.locks import NoLocksError, take

_VERSION = "2"  # of what is written; another one prepares anew


@dataclass(frozen=True)
class _Group:
    """Sources that become one token file, or a token file that exists."""

    sources: tuple[Source, ...]
    weight: float | None

    @property
    def prefix(self) -> Path | None:
        return self.sources[0].prefix


@dataclass(frozen=True)
class _Part:
    """A token file of the result; weight None: its number of tokens."""

    prefix: Path
    weight: float | None


def prepare(
    config: DataConfig, folder: Path, seq_length: int, report: Report, progress: Progress | None = None
) -> PreparedData:
    """Make a corpus ready for training, or find it ready.

    Safe when killed half-way (what is finished is kept, the rest is written again) and when several processes of one or
    more machines start at once (one works, the others wait and use what it wrote).

    Args:
        config: the `data` section.
        folder: where token files and a trained tokenizer go, e.g. the run's `data` folder; may be shared by runs.
        seq_length: inputs of a sample; a corpus too small for one is refused.
        report: takes lines for people.
        progress: is told the bytes read while tokenising.

    Raises:
        ConfigError: a source is missing, too small, or of another tokenizer.
        WorkError: a file is damaged, or cannot be read or written.
    """
    check_files(config, seq_length)
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder / "prepare.lock", report):
            prepared = _prepare(config, folder, report, progress)
    except OSError as problem:
        raise WorkError(
            f"the data could not be prepared: {problem}",
            where=str(folder),
            cure="free disk space or correct permissions there, and start again",
        ) from problem
    check_prepared(prepared, config, seq_length, "train")
    return prepared


def _prepare(config: DataConfig, folder: Path, report: Report, progress: Progress | None) -> PreparedData:
    training, validation = _groups(config.sources), _groups(config.validation_sources)
    hashes = ContentHashes(folder / "sources.json")
    key = _fingerprint(config, training, validation, hashes)
    hashes.save()
    place = folder / key
    weights = combined(str(group.weight) for group in (*training, *validation))[:8]
    record = place / f"prepared-{weights}.json"
    found = _find_prepared(record, place, hashes)
    if found is not None:
        report(f"data: as prepared before in {place}")
        _tell(found, report)
        return found
    fraction = 0.0 if validation else config.validation_fraction
    tokenizer = _tokenizer(config, training, fraction, place, report)
    train_parts: list[_Part] = []
    validation_parts: list[_Part] = []
    for number, group in enumerate(training):
        names = place / f"train-{number}", place / f"validation-{number}"
        parts = _write_group(group, names, fraction, config.text_key, tokenizer, hashes, report, progress)
        train_parts.append(parts[0])
        validation_parts.extend(parts[1:])
    for number, group in enumerate(validation):
        names = place / f"validation-{number}", place / "unused"
        validation_parts += _write_group(group, names, 0.0, config.text_key, tokenizer, hashes, report, progress)
    prepared = _result(train_parts, validation_parts, tokenizer, place / "order", hashes)
    hashes.save()
    write_text(record, _relative(prepared, place).to_json())
    report(f"data: prepared in {place}")
    _tell(prepared, report)
    return prepared


@contextmanager
def only_one(path: Path, report: Report) -> Iterator[None]:
    """Hold a lock that also other machines respect where the file system passes POSIX locks on; say who waits."""
    with open(path, "a") as handle:
        try:
            if not take(handle, path):
                report(f"data: another process works in {path.parent}; waiting for it")
                take(handle, path, wait=True)
        except NoLocksError as none:
            harm = "each would overwrite what the other writes"
            report(f"data: {none.warning('no other run prepares data there', harm)}")
        yield


def _groups(entries: Sequence[SourceEntry]) -> list[_Group]:
    """One group for each weighted entry and each token file; the other entries form one corpus."""
    groups: list[_Group] = []
    together: list[Source] = []
    for entry in entries:
        if not isinstance(entry, str):
            groups.append(_Group((find_source(entry.path),), entry.weight))
        elif (source := find_source(entry)).prefix is not None:
            groups.append(_Group((source,), None))
        else:
            together.append(source)
    return [_Group(tuple(together), None), *groups] if together else groups


def _fingerprint(
    config: DataConfig, training: Sequence[_Group], validation: Sequence[_Group], hashes: ContentHashes
) -> str:
    """Names a state of sources and tokenizer; weights are left out, since they change no token file."""
    parts = [_VERSION, config.text_key, str(config.validation_fraction if not validation else 0.0)]
    for title, groups in (("train", training), ("validation", validation)):
        for group in groups:
            parts.append(title)
            for source in group.sources:
                parts.append(source.name)
                if source.prefix is not None:
                    parts.append(token_file_content(source.prefix, hashes))
                for path in (part for file in source.files for part in file.parts()):
                    parts += [path.name, hashes.of(path)]
    parts.append(config.tokenizer.model_dump_json(exclude={"path"}))
    if config.tokenizer.path is not None:
        parts += [hashes.of(path) for path in tokenizer_files(config.tokenizer.path)]
    return combined(parts)[:16]


def _find_prepared(record: Path, place: Path, hashes: ContentHashes) -> PreparedData | None:
    """What was prepared before, if all of it is still there."""
    if not record.is_file():
        return None
    found = _absolute(PreparedData.from_json(record.read_text(encoding="utf-8")), place)
    if not Path(found.tokenizer_path).is_file():
        return None
    if not all(_is_complete(Path(prefix), hashes) for prefix in (*found.train_prefixes, *found.validation_prefixes)):
        return None
    return found


def _is_complete(prefix: Path, hashes: ContentHashes) -> bool:
    """Whether a token file is there, and as it was written (`orthant data verify` reads it all)."""
    if not (bin_path(prefix).is_file() and idx_path(prefix).is_file()):
        return False
    try:
        token_file_content(prefix, hashes)
    except WorkError:
        return False
    return True


def _written_before(prefixes: Sequence[Path], tokenizer: Tokenizer, hashes: ContentHashes) -> bool:
    """Whether these token files of ours are finished, and by this tokenizer."""
    manifests = [read_manifest(prefix) for prefix in prefixes if _is_complete(prefix, hashes)]
    return len(manifests) == len(prefixes) and all(
        manifest is not None and manifest.tokenizer_hash == tokenizer.hash for manifest in manifests
    )


def _tokenizer(
    config: DataConfig, training: Sequence[_Group], fraction: float, place: Path, report: Report
) -> Tokenizer:
    settings: TokenizerConfig = config.tokenizer
    if settings.path is not None:
        return load_tokenizer(settings.path.resolve(), settings.eod_token)
    home = place / "tokenizer"
    for name in FILE_NAMES:  # written last by train_tokenizer
        if (home / name).is_file():
            return load_tokenizer(home / name)
    from data.tokenizer_training import corpus_texts, train_tokenizer

    assert settings.kind is not None and settings.vocab_size is not None
    readings = [Reading(source) for group in training for source in group.sources]
    texts = corpus_texts(readings, config.text_key, fraction, report)
    return train_tokenizer(texts, settings.kind, settings.vocab_size, home, report)


def _write_group(
    group: _Group,
    names: tuple[Path, Path],
    fraction: float,
    text_key: str,
    tokenizer: Tokenizer,
    hashes: ContentHashes,
    report: Report,
    progress: Progress | None,
) -> list[_Part]:
    """The token file of a group and, where documents are held out, the one that holds those."""
    prefix = group.prefix
    if prefix is not None:
        refuse_other_tokenizer(prefix, tokenizer)
        if not fraction:
            return [_Part(prefix.resolve(), group.weight)]
    targets = names if fraction else names[:1]
    if not _written_before(targets, tokenizer, hashes):
        if prefix is not None:
            split_by_content(prefix.resolve(), names[0], names[1], fraction, tokenizer, report)
        else:
            held_out = names[1] if fraction else None
            job = Tokenization(group.sources, tokenizer, text_key, names[0], held_out, fraction)
            tokenize(job, report, progress)
    return [_Part(target, group.weight) for target in targets]


def _result(
    training: Sequence[_Part], validation: Sequence[_Part], tokenizer: Tokenizer, orders: Path, hashes: ContentHashes
) -> PreparedData:
    validation = [part for part in validation if IndexedTokens(part.prefix).tokens]
    weights = _weights(training)
    return PreparedData(
        train_prefixes=tuple(str(part.prefix) for part in training),
        train_weights=weights,
        train_contents=tuple(token_file_content(part.prefix, hashes) for part in training),
        validation_prefixes=tuple(str(part.prefix) for part in validation),
        validation_weights=_weights(validation),
        validation_contents=tuple(token_file_content(part.prefix, hashes) for part in validation),
        index_folder=str(orders),
        tokenizer_path=str(tokenizer.path),
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        eod_token=tokenizer.eod_token,
        unigram_entropy=_blend_entropy(training, weights, tokenizer.vocab_size),
    )


def _weights(parts: Sequence[_Part]) -> tuple[float, ...]:
    return tuple(float(IndexedTokens(part.prefix).tokens) if part.weight is None else part.weight for part in parts)


def _blend_entropy(parts: Sequence[_Part], weights: Sequence[float], vocab_size: int) -> float:
    """Entropy of the token frequencies of the blend, nats a token."""
    manifest: Manifest | None = read_manifest(parts[0].prefix)
    if len(parts) == 1 and manifest is not None:
        return manifest.unigram_entropy
    blend = np.zeros(vocab_size, dtype=np.float64)
    for part, weight in zip(parts, weights, strict=True):
        counts = token_counts(part.prefix, vocab_size)
        blend += weight * counts / max(1, int(counts.sum()))
    return entropy(blend)


def _relative(prepared: PreparedData, place: Path) -> PreparedData:
    """With paths inside `place` relative to it, so that the folder may move."""

    def shorten(path: str) -> str:
        return str(Path(path).relative_to(place)) if Path(path).is_relative_to(place) else path

    return _with_paths(prepared, [shorten(path) for path in _paths(prepared)])


def _absolute(prepared: PreparedData, place: Path) -> PreparedData:
    return _with_paths(prepared, [str(place / path) for path in _paths(prepared)])


def _paths(prepared: PreparedData) -> list[str]:
    return [*prepared.train_prefixes, *prepared.validation_prefixes, prepared.index_folder, prepared.tokenizer_path]


def _with_paths(prepared: PreparedData, paths: Sequence[str]) -> PreparedData:
    train = len(prepared.train_prefixes)
    return dataclasses.replace(
        prepared,
        train_prefixes=tuple(paths[:train]),
        validation_prefixes=tuple(paths[train:-2]),
        index_folder=paths[-2],
        tokenizer_path=paths[-1],
    )


def _tell(prepared: PreparedData, report: Report) -> None:
    """Documents in, out, and why."""
    for title, prefixes in (("to train on", prepared.train_prefixes), ("held out", prepared.validation_prefixes)):
        for prefix in prefixes:
            file, manifest = IndexedTokens(prefix), read_manifest(Path(prefix))
            bad = sum(source.bad_lines for source in manifest.sources) if manifest is not None else 0
            left_out = f", {bad:,} bad lines left out" if bad and title == "to train on" else ""
            report(
                f"data: {file.documents:,} documents {title}, {file.tokens:,} tokens, "
                f"{int((np.diff(file.document_index) == 0).sum()):,} documents empty{left_out}  ({prefix})"
            )
    if not prepared.validation_prefixes:
        report("data: no document is held out")
