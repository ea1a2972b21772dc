"""Lists of pictures: a manifest file, paths on standard input, and names in braces.

    .txt      a path per line
    .csv      a header that names a column image, path, file, filename or file_name; with commas, or where the header
              has none, with semicolons or tabs
    .jsonl    a JSON object per line with such a key

Read line by line: a list may be longer than the memory holds. A bad line is said, and the next ones are read. A path
that is not UTF-8 keeps its bytes (`surrogateescape`, as everywhere in Python).
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

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


class BadLine(NamedTuple):
    """A line of a manifest that names no path.

    Args:
        number: from 1.
        message: fault and remedy, without the manifest's name.
    """

    number: int
    message: str


def manifest_paths(path: Path) -> Iterator[str | BadLine]:
    """Read the paths that a manifest names.

    Args:
        path: of the manifest; its suffix says what it is.

    Yields:
        Each path as written, or what is wrong with its line; empty lines are passed over.

    Raises:
        ConfigError: when the manifest is in UTF-16.
        DataError: when the manifest cannot be read, or lacks a fitting column.
    """
    reader = {".txt": _text_paths, ".csv": _csv_paths, ".jsonl": _jsonl_paths}[path.suffix.lower()]
    try:
        with path.open("rb") as file:
            _check_utf8(printable(str(path)), file.read(_LONGEST_PATH))
        yield from reader(path)
    except OSError as err:
        raise DataError(f"{printable(str(path))}: cannot be read ({err.strerror}); check the manifest") from err


def _check_utf8(label: str, beginning: bytes) -> None:
    """Refuse what Windows' "Unicode" is: read as UTF-8, every path of it would be one that is not there."""
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in beginning:
        raise ConfigError(f"{label}: in UTF-16, or no text at all; save it as UTF-8, one path a line")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line with its number."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(line) > _LONGEST_LINE:
                where = f"{printable(str(path))}:{number}"
                raise DataError(f"{where}: a line of more than {_LONGEST_LINE} bytes; give a list of paths")
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip(b"\r\n")
            if text:
                yield number, text.decode("utf-8", "surrogateescape")


def _text_paths(path: Path) -> Iterator[str]:
    return (text for _, text in _lines(path))


def _csv_paths(path: Path) -> Iterator[str | BadLine]:
    label = printable(str(path))
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True, delimiter=_delimiter(path))
        column: int | None = None
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            except csv.Error as err:
                fault = f"not comma-separated values ({err}); correct this line"
                if column is None:
                    raise DataError(f"{label}:{rows.line_num}: {fault}") from err
                yield BadLine(rows.line_num, fault)
                continue
            if column is None:
                found = _column(row) if row else None
                if isinstance(found, BadLine):
                    raise DataError(f"{label}:{rows.line_num}: {found.message}")
                column = None if found is None else row.index(found)
            elif len(row) > column:
                if row[column]:
                    yield row[column]
            elif row:
                yield BadLine(rows.line_num, f"only {len(row)} values; the path is in column {column + 1}")
    if column is None:
        raise DataError(f"{label}: empty; give a header that names a column {_or(COLUMNS)}")


def _delimiter(path: Path) -> str:
    """Return what parts the columns: spreadsheets of many countries write semicolons."""
    header = next((text for _, text in _lines(path)), "")
    return next((sign for sign in (",", ";", "\t") if sign in header), ",")


def _jsonl_paths(path: Path) -> Iterator[str | BadLine]:
    for number, text in _lines(path):
        found = _json_path(text)
        if isinstance(found, BadLine):
            yield found._replace(number=number)
        elif found:
            yield found


def _json_path(text: str) -> str | BadLine:
    try:
        row: Any = json.loads(text)
    except (ValueError, RecursionError) as err:
        return BadLine(0, f"not JSON ({printable(str(err))}); correct this line")
    if not isinstance(row, dict):
        return BadLine(0, f"not a JSON object; write one per line with a key {_or(COLUMNS)}")
    column = _column(list(row))
    if isinstance(column, BadLine):
        return column
    value = row[column]
    if not isinstance(value, str):
        return BadLine(0, f"the path must be text, got {printable(repr(value)):.60}")
    return value


def _column(names: list[str]) -> str | BadLine:
    plain = {name.strip().lower(): name for name in reversed(names)}
    for wanted in COLUMNS:
        if wanted in plain:
            return plain[wanted]
    there = printable(", ".join(names))[:200]
    return BadLine(0, f"no column {_or(COLUMNS)} among {there}; rename the one with the paths")


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def stream_paths(stream: IO[Any]) -> Iterator[str]:
    """Read paths from standard input: one a line, or NUL-separated as `find -print0` writes them.

    Args:
        stream: text or binary. When its first 8192 bytes hold a NUL, NUL separates the paths.

    Yields:
        Each path.

    Raises:
        ConfigError: when it is in UTF-16.
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
    if rest.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0\0\0" in (rest[2:8:2], rest[3:9:2]):
        raise ConfigError("standard input: in UTF-16; write the paths in UTF-8, one a line")
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
