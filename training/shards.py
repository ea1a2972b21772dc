"""Pictures and captions streamed from WebDataset tar files, for sets that do not fit a disk or a machine.

Every reader of a data set is one of `world_size * workers` consumers. Each gets as many whole shards as all the others;
the shards that remain when they do not divide evenly are read by all, and each takes every n-th sample of these. So
each sample goes to exactly one consumer, and consumers differ in what they get by as much as shards differ in size,
and by one sample per shard that is shared. Give many shards of one size, and at least as many
as there are consumers: sharing one means reading all of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from glob import glob
from itertools import islice
from pathlib import Path

from captioner.errors import ConfigError, DataError
from training.sources import BadPicture, CaptionedPicture, DataSource
from training.tar_samples import StreamedPicture, read_tar

__all__ = ["StreamedPicture", "expand_shards", "find_shards", "read_captions", "stream_samples"]

_MOST_SHARDS = 1_000_000


# --- Which shards ---


def expand_shards(pattern: str, root: Path | None = None) -> list[Path]:
    """Find the tar files that a pattern names.

    Args:
        pattern: a path; `{000..012}` stands for each number of the range, `{a,b}` for each word, and `*`, `?` and
            `[abc]` for what is there. No URL: nothing is fetched.
        root: folder of relative paths; default: the current one.

    Returns:
        The files in the order of the braces, and by name where a `*` and the like names several.

    Raises:
        ConfigError: for a URL, or braces that are malformed or name more than a million files.
        DataError: when a file is missing, nothing is found, or a file is named twice.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", pattern):
        raise ConfigError(f"{pattern}: a URL, and nothing is fetched; mount or download the shards and give a path")
    root = root or Path()
    shards: list[Path] = []
    for name in _expand(pattern, pattern):
        if (root / name).is_file() or not re.search(r"[*?[]", name):
            shards.append(root / name)
        else:
            found = glob(name, root_dir=root)  # noqa: PTH207 - a Path takes no absolute pattern
            shards += [root / path for path in sorted(found)]
    if not shards:
        raise DataError(f"{root / pattern}: no such tar file; check root and the pattern")
    if missing := [str(shard) for shard in shards if not shard.is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}{more}: no such tar file; check root and the pattern {pattern}")
    if len(set(shards)) < len(shards):
        raise DataError(f"{pattern}: names a tar file twice; name each once")
    return shards


def _expand(name: str, pattern: str) -> list[str]:
    head, brace, rest = name.partition("{")
    body, end, tail = rest.partition("}")
    if "}" in head or "{" in body or (brace and not end):
        raise ConfigError(f"{pattern}: braces that do not match; write {{000..012}} or {{a,b}}, not one in another")
    if not brace:
        return [name]
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", body, re.ASCII)
    words: Sequence[str] = body.split(",")
    count = len(words)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        count = last - first + 1
    elif count < 2:
        raise ConfigError(f"{pattern}: {{{body}}} is no range; write {{000..012}} or {{a,b}}")
    tails = _expand(tail, pattern)
    if not 1 <= count * len(tails) <= _MOST_SHARDS:
        raise ConfigError(f"{pattern}: {{{body}}} must rise, and name at most {_MOST_SHARDS} files in all")
    if numbers:
        # As in a shell: a zero in front sets the width.
        width = max(len(part) for part in numbers.groups()) if re.search(r"(^|\.)0\d", body) else 0
        words = [f"{number:0{width}d}" for number in range(first, last + 1)]
    return [f"{head}{word}{end}" for word in words for end in tails]


def find_shards(source: DataSource) -> dict[str, list[Path]]:
    """Find the tar files of a data source.

    Args:
        source: of format "shards".

    Returns:
        The files of "train" and "dev".

    Raises:
        ConfigError: when the source has another format, or a pattern is malformed.
        DataError: when a file is missing, or named twice.
    """
    if source.train_shards is None or source.dev_shards is None:
        raise ConfigError(f"data source: format {source.format} has no shards; read it with read_source")
    root = Path(source.root)
    shards = {
        "train": expand_shards(source.train_shards, root),
        "dev": expand_shards(source.dev_shards, root),
    }
    if both := sorted(str(path) for path in set(shards["train"]) & set(shards["dev"])):
        raise DataError(f"{both[0]}: in train_shards and in dev_shards; name it in one of them")
    return shards


# --- Streams ---


def stream_samples(
    shards: Sequence[Path],
    *,
    epoch: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    worker: int = 0,
    workers: int = 1,
    shuffle_buffer: int = 0,
    skip: int = 0,
) -> Iterator[StreamedPicture | BadPicture]:
    """Stream one consumer's samples of one epoch. The same arguments and files give the same stream.

    A damaged tar gives one `BadPicture` where the damage begins, and ends there; the next shard follows.

    Args:
        shards: tar files; the same list, in the same order, for all consumers.
        epoch: chooses the order, with the seed.
        seed: likewise.
        rank: of this process, from 0.
        world_size: number of processes.
        worker: of this process's loaders, from 0.
        workers: loaders per process.
        shuffle_buffer: samples that are held in memory, among which the next one is drawn; the shards are shuffled
            too. 0: all comes in the order of the shards.
        skip: samples of this consumer that are passed over, to resume within an epoch; good and bad ones count. They
            are read again, but not decoded.

    Returns:
        The samples, and what is bad in their place.

    Raises:
        ConfigError: for a rank, worker, buffer or skip out of its range.
        DataError: here when there are no shards; from the stream when a shard is missing or has no sample.
    """
    _check_range("rank", rank, world_size)
    _check_range("worker", worker, workers)
    if shuffle_buffer < 0 or skip < 0:
        raise ConfigError(f"shuffle_buffer and skip must be at least 0, got {shuffle_buffer} and {skip}")
    if not shards:
        raise DataError("no shards to stream; name at least one tar file")
    consumer, consumers = rank * workers + worker, world_size * workers
    order = random.Random(f"{seed} {epoch}")
    parts = _parts(shards, consumer, consumers, order if shuffle_buffer else None)
    samples: Iterator[StreamedPicture | BadPicture] = (
        sample for shard, first, step in parts for sample in islice(read_tar(shard, with_data=True), first, None, step)
    )
    if shuffle_buffer:
        samples = _shuffled(samples, shuffle_buffer, random.Random(f"{seed} {epoch} {consumer}"))
    return islice(samples, skip, None)


def _check_range(name: str, value: int, size: int) -> None:
    if not 0 <= value < size:
        raise ConfigError(f"{name} must be at least 0 and below {size}, got {value}")


def _parts(
    shards: Sequence[Path], consumer: int, consumers: int, order: random.Random | None
) -> list[tuple[Path, int, int]]:
    """Return what a consumer reads: shard, index of the first sample, and step to the next."""
    ordered = list(shards)
    if order is not None:
        order.shuffle(ordered)
    whole = len(ordered) - len(ordered) % consumers
    own = [(shard, 0, 1) for shard in ordered[:whole][consumer::consumers]]
    return own + [(shard, consumer, consumers) for shard in ordered[whole:]]


def _shuffled(
    samples: Iterator[StreamedPicture | BadPicture], size: int, order: random.Random
) -> Iterator[StreamedPicture | BadPicture]:
    buffer: list[StreamedPicture | BadPicture] = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        at = order.randrange(size)
        drawn, buffer[at] = buffer[at], sample
        yield drawn
    order.shuffle(buffer)
    while buffer:
        yield buffer.pop()


def read_captions(shards: Sequence[Path]) -> Iterator[CaptionedPicture | BadPicture]:
    """Stream all captions in the order of the shards, for vocabulary, hash and counts; keeps no picture.

    Args:
        shards: tar files.

    Yields:
        What `stream_samples` yields on one consumer without shuffling, without the bytes; the path of a picture is
        its shard.

    Raises:
        DataError: when a shard is missing or has no sample.
    """
    for shard in shards:
        for sample in read_tar(shard, with_data=False):
            yield sample if isinstance(sample, BadPicture) else CaptionedPicture(sample.name, shard, sample.captions)
