"""Tables of all records: CSV and Parquet, written as they are read, and put in place whole."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from captioner.atomic import replacing
from captioner.errors import ConfigError
from captioner.folders import is_picture_name
from captioner.manifests import printable

CSV_COLUMNS = ("image", "caption", "score", "confidence", "alternatives", "error_type", "error_message")
ALT_TEXT = "alt_text"
"""Column, and key of the records, that is there when alternative texts are asked for; it follows the caption."""
ROW_GROUP = 10_000
"""Records that a Parquet writer holds at once, and a reader reads at once."""

# What makes a spreadsheet take a text for a formula (OWASP, "CSV Injection").
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_csv(
    records: Iterable[Mapping[str, Any]],
    path: Path,
    *,
    alt_text: bool = False,
    claim: Callable[[str], None] | None = None,
) -> None:
    r"""Write records as comma-separated values (RFC 4180, UTF-8), with `CSV_COLUMNS` in the first line.

    A file's name may be made to run as a formula where a spreadsheet opens the table: the name of a picture that
    begins like one gets "./" before it, and names the same file still; any other text gets an apostrophe. Bytes of a
    name that are no UTF-8 are written as an escape, such as `\udcff`.

    Args:
        records: as `Caption.to_record` makes them.
        path: of the table; one that is there is replaced when all is written.
        alt_text: give the table a column of alternative texts.
        claim: called with the `table_hash` of what is written, just before it is put in place.

    Raises:
        ConfigError: when the path is one of a picture.
        OSError: when the disk takes no more; nothing is left then.
    """
    _check_path(path)
    columns = _with_alt_text(CSV_COLUMNS) if alt_text else CSV_COLUMNS
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
        rows = csv.writer(text, lineterminator="\r\n")
        rows.writerow(columns)
        for record in records:
            error = record.get("error") or {}
            image = str(record["image"])
            alternatives = record.get("alternatives") or []
            values = {
                "image": f"./{image}" if image.startswith(_FORMULA) else image,
                "caption": _harmless(record.get("caption")),
                ALT_TEXT: _harmless(record.get(ALT_TEXT)),
                "score": record.get("score"),
                "confidence": record.get("confidence"),
                "alternatives": json.dumps(alternatives, ensure_ascii=False) if alternatives else "",
                "error_type": error.get("type"),
                "error_message": _harmless(error.get("message")),
            }
            rows.writerow([values[name] for name in columns])
        text.flush()
        text.detach()
        _claim(file, claim)


def _with_alt_text(names: tuple[str, ...]) -> tuple[str, ...]:
    at = names.index("caption") + 1
    return (*names[:at], ALT_TEXT, *names[at:])


def _claim(file: IO[bytes], claim: Callable[[str], None] | None) -> None:
    """Say what a table holds while it still has another name."""
    if claim is not None:
        file.flush()
        claim(table_hash(Path(file.name)))


def table_hash(path: Path) -> str:
    """Return a hash by which a table that we wrote is known again.

    Args:
        path: of the table.

    Returns:
        SHA-256, in hexadecimal.

    Raises:
        OSError: when it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _harmless(text: str | None) -> str | None:
    return f"'{text}" if text is not None and text.startswith(_FORMULA) else text


def _check_path(path: Path) -> None:
    if is_picture_name(path.name):
        raise ConfigError(
            f"{printable(str(path))}: the name of a picture, which a table must not replace; give another"
        )


def require_parquet() -> None:
    """Check that Parquet can be written.

    Raises:
        ConfigError: when pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as err:
        raise ConfigError("Parquet needs pyarrow: pip install captioner[parquet]") from err


def write_parquet(
    records: Iterable[Mapping[str, Any]],
    path: Path,
    *,
    alt_text: bool = False,
    claim: Callable[[str], None] | None = None,
) -> None:
    r"""Write records as Parquet, with all that they hold, in groups of `ROW_GROUP` rows.

    Columns: image, caption (string; alt_text after it, when asked for), score, confidence (double), words (list of
    word, probability), alternatives (list of caption, score), error (type, message; null when there was none). Bytes of
    a name that are no UTF-8 are written as an escape, such as `\udcff`.

    Args:
        records: as `Caption.to_record` makes them.
        path: of the table; one that is there is replaced when all is written.
        alt_text: give the table a column of alternative texts.
        claim: called with the `table_hash` of what is written, just before it is put in place.

    Raises:
        ConfigError: when pyarrow is not installed, or the path is one of a picture.
        OSError: when the disk takes no more; nothing is left then.
    """
    require_parquet()
    _check_path(path)
    import pyarrow as pa
    from pyarrow import parquet

    fields = [
        pa.field("image", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("confidence", pa.float64()),
        pa.field("words", pa.list_(pa.struct([("word", pa.string()), ("probability", pa.float64())]))),
        pa.field("alternatives", pa.list_(pa.struct([("caption", pa.string()), ("score", pa.float64())]))),
        pa.field("error", pa.struct([("type", pa.string()), ("message", pa.string())])),
    ]
    schema = pa.schema([*fields[:2], *([pa.field(ALT_TEXT, pa.string())] if alt_text else []), *fields[2:]])
    with replacing(path) as file:
        with parquet.ParquetWriter(file, schema) as table:
            stream = iter(records)
            while group := list(islice(stream, ROW_GROUP)):
                rows = [{name: _utf8(record.get(name)) for name in schema.names} for record in group]
                table.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema), row_group_size=ROW_GROUP)
        _claim(file, claim)


def _utf8(value: Any) -> Any:
    """Return a value whose texts are all UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, list):
        return [_utf8(item) for item in value]
    if isinstance(value, dict):
        return {key: _utf8(item) for key, item in value.items()}
    return value
