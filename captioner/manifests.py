"""Lists of pictures: a manifest file, paths on standard input, and names in braces.

    .txt      a path per line
    .csv      a header that names a column image, path, file, filename or file_name
    .jsonl    a JSON object per line with such a key

Read line by line: a list may be longer than the memory holds. A path that is not UTF-8 keeps its bytes
(`surrogateescape`, as everywhere in Python).
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from captioner.errors import ConfigError, DataError

MANIFEST_SUFFIXES = (".txt", ".csv", ".jsonl")
COLUMNS = ("image", "path", "file", "filename", "file_name")
_LONGEST_LINE = 2**20
_LONGEST_PATH = 2**13  # bytes; twice PATH_MAX of Linux
_MOST_NAMES = 1_000_000


def printable(text: str) -> str:
    """Return a text as one line of a message: a file's name may hold line breaks, escape codes and surrogates.

    Args:
        text: any.

    Returns:
        The same text with what does not print written as an escape.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def manifest_paths(path: Path) -> Iterator[str]:
    """Read the paths that a manifest names.

    Args:
        path: of the manifest; its suffix says what it is.

    Yields:
        Each path as written; empty lines are passed over.

    Raises:
        DataError: when the manifest cannot be read, lacks a fitting column, or a line is malformed, with its number.
    """
    reader = {".txt": _text_paths, ".csv": _csv_paths, ".jsonl": _jsonl_paths}[path.suffix.lower()]
    try:
        yield from reader(path)
    except OSError as err:
        raise DataError(f"{printable(str(path))}: cannot be read ({err.strerror}); check the manifest") from err


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each line with "FILE:LINE" for messages."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            where = f"{printable(str(path))}:{number}"
            if len(line) > _LONGEST_LINE:
                raise DataError(f"{where}: a line of more than {_LONGEST_LINE} bytes; give a list of paths")
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
            if text:
                yield where, text.decode("utf-8", "surrogateescape")


def _text_paths(path: Path) -> Iterator[str]:
    return (text for _, text in _lines(path))


def _csv_paths(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        column: int | None = None
        try:
            for row in rows:
                where = f"{printable(str(path))}:{rows.line_num}"
                if column is None:
                    column = row.index(_column(where, row)) if row else None
                elif len(row) > column:
                    if row[column]:
                        yield row[column]
                elif row:
                    raise DataError(f"{where}: only {len(row)} values; the path is in column {column + 1}")
        except csv.Error as err:
            where = f"{printable(str(path))}:{rows.line_num}"
            raise DataError(f"{where}: not comma-separated values ({err}); correct this line") from err
    if column is None:
        raise DataError(f"{printable(str(path))}: empty; give a header that names a column {_or(COLUMNS)}")


def _jsonl_paths(path: Path) -> Iterator[str]:
    for where, text in _lines(path):
        try:
            row: Any = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise DataError(f"{where}: not JSON ({printable(str(err))}); correct this line") from err
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object; write one per line with a key {_or(COLUMNS)}")
        value = row[_column(where, list(row))]
        if not isinstance(value, str):
            raise DataError(f"{where}: the path must be text, got {printable(repr(value)):.60}")
        if value:
            yield value


def _column(where: str, names: list[str]) -> str:
    plain = {name.strip().lower(): name for name in reversed(names)}
    for wanted in COLUMNS:
        if wanted in plain:
            return plain[wanted]
    there = printable(", ".join(names))[:200]
    raise DataError(f"{where}: no column {_or(COLUMNS)} among {there}; rename the one with the paths")


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def stream_paths(stream: IO[Any]) -> Iterator[str]:
    """Read paths from standard input: one a line, or NUL-separated as `find -print0` writes them.

    Args:
        stream: text or binary. When its first 8192 bytes hold a NUL, NUL separates the paths.

    Yields:
        Each path.

    Raises:
        DataError: for a path of more than 8192 bytes.
    """
    binary = getattr(stream, "buffer", stream)
    read = getattr(binary, "read1", binary.read)  # what is there now, so that a slow writer is followed

    def chunk() -> bytes:
        data = read(2**16)
        return os.fsencode(data) if isinstance(data, str) else bytes(data or b"")

    rest, data = b"", b"."
    while data and len(rest) < _LONGEST_PATH:
        data = chunk()
        rest += data
    separator = b"\0" if b"\0" in rest else b"\n"
    while True:
        *paths, rest = rest.split(separator)
        for path in paths:
            yield from _stream_path(path, separator)
        if len(rest) > _LONGEST_PATH:
            raise DataError(f"standard input: a path of more than {_LONGEST_PATH} bytes; write one path a line")
        if not data:  # A terminal says its end once only.
            yield from _stream_path(rest, separator)
            return
        data = chunk()
        rest += data


def _stream_path(path: bytes, separator: bytes) -> Iterator[str]:
    path = path.removesuffix(b"\r") if separator == b"\n" else path
    if path:
        yield path.decode("utf-8", "surrogateescape")


def expand_braces(text: str) -> list[str]:
    """Write out `shards-{000..012}.tar` and `{a,b}.zip`, as a shell does.

    Args:
        text: a path. Braces that are neither a range nor a list stay as they are.

    Returns:
        The names in the order of the braces; the text alone when it has none.

    Raises:
        ConfigError: for a range that falls, or more than a million names.
    """
    found = re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}|\{([^{},]*(?:,[^{},]*)+)\}", text, re.ASCII)
    if found is None:
        return [text]
    first, last, words = found.groups()
    count = int(last) - int(first) + 1 if words is None else words.count(",") + 1
    tails = expand_braces(text[found.end() :])
    if not 1 <= count * len(tails) <= _MOST_NAMES:
        raise ConfigError(
            f"{printable(text)}: {found[0]} must rise, and stand for at most {_MOST_NAMES} names in all; correct it"
        )
    if words is not None:
        middles = words.split(",")
    else:
        # A zero in front sets the width.
        width = max(len(first), len(last)) if any(re.match(r"0\d", part) for part in (first, last)) else 0
        middles = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    head = text[: found.start()]
    return [f"{head}{middle}{tail}" for middle in middles for tail in tails]
