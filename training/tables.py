"""Rows of a table of captions: comma-separated values, or one JSON object per line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from captioner.errors import DataError
from captioner.metrics.readers import read_jsonl, read_text


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a table.

    Args:
        path: one JSON object per line if the name ends in .jsonl; else comma-separated values (RFC 4180), the names
            of the columns in the first line.

    Yields:
        The line on which a row begins, from 1, and its cells by column; those of a CSV are text.

    Raises:
        DataError: when a line is malformed, with its number.
        MetricError: when the file cannot be read, or a line is not a JSON object.
    """
    if path.suffix.lower() == ".jsonl":
        yield from read_jsonl(path, read_text(path))
        return
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            if values and not header:
                header = _header(f"{path}:{line}", values)
            elif values and len(values) != len(header):
                raise DataError(
                    f"{path}:{line}: {len(values)} values for {len(header)} columns ({_names(header)}); "
                    "put a caption with a comma in double quotes"
                )
            elif values:
                yield line, dict(zip(header, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as err:
        raise DataError(f"{path}:{line}: not comma-separated values: {err}; correct this line") from err


def _header(where: str, values: list[str]) -> list[str]:
    header = [name.strip() for name in values]
    if len(set(header)) < len(header):
        raise DataError(f"{where}: two columns of one name in {_names(header)}; rename or remove one")
    return header


def _names(columns: Iterable[str]) -> str:
    return ", ".join(ascii(name)[1:-1] if not name.isprintable() else name for name in columns)


def read_cell(where: str, row: Mapping[str, Any], column: str, option: str) -> str:
    """Read one cell as text.

    Args:
        where: file and line, for the error.
        row: cells by column.
        column: which.
        option: the setting that names the column, for the error.

    Returns:
        Its text, without space around it.

    Raises:
        DataError: when there is no such column, or the cell is no text or empty.
    """
    if column not in row:
        raise DataError(f"{where}: no column {column!r}; there are {_names(row)}; name the right one with {option}")
    if not isinstance(row[column], str) or not row[column].strip():
        raise DataError(f"{where}: {column!r} must be text and not empty, got {row[column]!r:.40}")
    return str(row[column]).strip()
